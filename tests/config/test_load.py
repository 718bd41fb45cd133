"""Reading YAML, overrides, defaults, and writing the resolved file."""

import os
import subprocess
import sys

import pytest
import yaml

from nha_megatron.config import ConfigError, RunConfig, dump_config, load_config, parse_config, save_resolved, with_overrides
from tests.config.cases import BASE, model, run


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def test_a_file_is_read_and_defaults_are_filled_in(base):
    config = load_config(base)
    assert config.model.head_dim == 16  # hidden_size 64 / num_heads 4
    assert config.model.tau == 8.0
    assert config.parallel.tensor == 1
    assert config.optimizer.betas == (0.9, 0.95)
    assert str(config.checkpoint_directory) == "runs/test/checkpoints"


def test_head_dim_may_be_null_or_differ_from_the_quotient(base):
    assert load_config(base, ["model.head_dim=null"]).model.head_dim == 16
    assert load_config(base, ["model.head_dim=32"]).model.head_dim == 32
    assert model(num_heads=3, num_kv_heads=1, head_dim=16).num_heads == 3  # 64 / 3 is not needed when head_dim is given


def test_the_checkpoint_directory_can_be_chosen():
    assert str(run(checkpoint={"path": "elsewhere"}).checkpoint_directory) == "elsewhere"


def test_overrides_are_applied_in_order_and_read_as_yaml(base):
    config = load_config(
        base,
        [
            "training.steps=20",
            "training.steps=30",
            "optimizer.lr=3e-4",
            "optimizer.betas=[0.8, 0.9]",
            "parallel.context=2",
            "model.window=16*3,8",
            "model.rope_scaling={rope_type: linear, factor: 2.0}",
            "model.rope_scaling.factor=4",
            "data.path=[{path: a, weight: 2}, {path: b=c, weight: 1.5}]",
            "data.tokenizer=null",
            "checkpoint.resume=false",
        ],
    )
    assert config.training.steps == 30
    assert config.optimizer.lr == 3e-4 and isinstance(config.optimizer.lr, float)
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.parallel.context == 2
    assert [layer.options.window for layer in config.model.stack] == [16, 16, 16, 8]
    assert config.model.rope_scaling == {"rope_type": "linear", "factor": 4}
    assert [(entry.path, entry.weight) for entry in config.data.training_blend] == [("a", 2), ("b=c", 1.5)]
    assert config.data.tokenizer is None
    assert config.checkpoint.resume is False


def test_an_override_can_change_a_configuration_that_is_already_there():
    changed = with_overrides(run(), ["training.seed=7"])
    assert changed.training.seed == 7 and with_overrides(changed, ["training.seed=0"]) == run()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3E-4", 3e-4),
        ("1.5e-3", 1.5e-3),
        ("1", 1),
        ("2_000.5", 2000.5),
        (".5", 0.5),
        ("1.", 1.0),
        ("+2E+1", 20.0),
        ("1_000", 1000),
    ],
)
def test_numbers_are_read_as_people_write_them(base, text, value):
    # YAML 1.1, and so PyYAML alone, reads 1e-3 as a string because it has no point.
    assert load_config(base, [f"optimizer.lr={text}"]).optimizer.lr == value


def test_a_section_that_is_only_a_heading_means_its_defaults(base):
    base.write_text(BASE + "parallel:\ncheckpoint:\n")
    assert load_config(base) == run()


def test_a_path_is_a_blend_of_one():
    config = run(data={"path": "a", "validation": [{"path": "v", "weight": 3}]})
    assert [(entry.path, entry.weight) for entry in config.data.training_blend] == [("a", 1.0)]
    assert [entry.path for entry in config.data.validation_blend] == ["v"]
    assert run().data.validation_blend == ()


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"window": "16,8*2,0", "rope_scaling": {"rope_type": "linear", "factor": 2.5}}, "parallel": {"context": 2}},
        {"data": {"path": [{"path": "a", "weight": 0.1}]}, "optimizer": {"lr": 1e-300, "eps": 1e-20, "betas": [0.0, 0.999]}},
        *({"logging": {"directory": text}} for text in ("1e3", "010", "1:30", "0x1", "3", ".5", "null", "no", "~", "2020-01-01", "=")),
        {"logging": {"directory": "runs/yes: #no\n'\"é"}, "training": {"seed": 2**31 - 1}},
    ],
)
def test_the_resolved_file_loads_back_to_an_equal_object(sections, tmp_path):
    config = run(**sections)
    path = tmp_path / "new" / "resolved.yaml"
    save_resolved(config, path)
    assert load_config(path) == config
    assert os.listdir(path.parent) == ["resolved.yaml"]  # nothing of the writing is left behind


def test_the_resolved_file_holds_every_field():
    data = yaml.safe_load(dump_config(run()))
    for name, field in RunConfig.model_fields.items():
        assert set(data[name]) == set(field.annotation.model_fields)
    assert data["model"]["head_dim"] == 16


def test_saving_again_replaces_the_file(tmp_path):
    path = tmp_path / "resolved.yaml"
    save_resolved(run(), path)
    save_resolved(run(training={"steps": 11}), path)
    assert load_config(path).training.steps == 11


def test_every_field_is_documented():
    for section in RunConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description, f"{section.annotation.__name__}.{name} has no docstring"


def test_configurations_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        run().training.steps = 3


def test_all_problems_of_a_file_stand_in_one_message():
    data = yaml.safe_load(BASE)
    data["model"]["num_head"] = 3  # the model section is faulty, so nothing that needs it is checked
    data["optimizer"]["lr"] = -1
    data["training"]["global_batch_size"] = 7
    data["training"]["engine"] = "deepspeed"
    data["parallel"] = {"pipeline": 2}
    data["checkpoint"] = {"every": 0}
    with pytest.raises(ConfigError) as error:
        parse_config(data, source="run.yaml")
    first, *problems = str(error.value).splitlines()
    assert first == "run.yaml: 5 problems"
    for part in ("model.num_head", "optimizer.lr", "global_batch_size 7", "deepspeed", "checkpoint.every"):
        assert sum(part in problem for problem in problems) == 1


def test_configuration_loads_without_torch_or_megatron():
    code = (
        "import sys, nha_megatron.__main__, nha_megatron.config; "
        "loaded = {'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
