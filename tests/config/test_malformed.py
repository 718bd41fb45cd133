"""Mistakes that users make, each with what its message must say. A message never is a traceback or another exception."""

import copy
from datetime import date

import pytest
import yaml

from nha_megatron.config import ConfigError, RunConfig, load_config, parse_config
from tests.config.cases import BASE


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def message_of(path, *overrides):
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert type(error.value) is ConfigError and error.value.__cause__ is None
    return str(error.value)


OVERRIDES = {
    # unknown keys
    "misspelt key": ("model.num_head=4", "model.num_head: unknown key; did you mean 'num_heads'?"),
    "misspelt section": ("modle.num_heads=4", "modle: unknown key; did you mean 'model'?"),
    "unknown section": (
        "experts.count=4",
        "experts: unknown key; allowed: model, parallel, data, training, optimizer, checkpoint, guards, logging",
    ),
    "key of another section": ("model.lr=1.0", "model.lr: unknown key; it belongs to section 'optimizer': optimizer.lr"),
    "unknown key": ("training.zzz=1", "training.zzz: unknown key; allowed: steps, micro_batch_size"),
    "unknown key of a blend": ("data.path=[{path: x, weight: 1, wieght: 2}]", "data.path.0.wieght: unknown key; did you mean 'weight'?"),
    "derived value": ("model.padded_vocab_size=512", "model.padded_vocab_size: unknown key"),
    # wrong types
    "text for a number": ("model.num_layers=four", "model.num_layers: given 'four', must be a whole number"),
    "quoted number": ("model.num_layers='4'", "model.num_layers: given '4', must be a whole number"),
    "fraction": ("model.num_layers=4.5", "model.num_layers: given 4.5, must be a whole number"),
    "whole fraction": ("model.num_layers=4.0", "model.num_layers: given 4.0, must be a whole number"),
    "bool for a number": ("model.num_layers=true", "model.num_layers: given True, must be a whole number"),
    "null for a number": ("model.num_layers=null", "model.num_layers: given None, must be a whole number"),
    "nothing for a number": ("training.steps=", "training.steps: given None, must be a whole number"),
    "list for a number": ("optimizer.lr=[1.0]", "optimizer.lr: given [1.0], must be a number"),
    "bool for a real number": ("optimizer.lr=true", "optimizer.lr: given True, must be a number"),
    "number for a bool": ("parallel.sequence=1", "parallel.sequence: given 1, must be true or false"),
    "text for a bool": ("model.qkv_bias='no'", "model.qkv_bias: given 'no', must be true or false"),
    "number for a text": ("logging.directory=3", "logging.directory: given 3, must be a text"),
    "number for a path": ("data.path=3", "data.path: given 3, must be a text or a list"),
    "mapping for a blend": ("data.path={a: 1}", "data.path: given {'a': 1}, must be a text or a list"),
    "text in a blend": ("data.path=[a]", "data.path.0: given 'a', must be a mapping"),
    "list for a window": ("model.window=[1, 2]", "model.window: given [1, 2], must be a whole number or a text"),
    "text for a mapping": ("model.rope_scaling=linear", "model.rope_scaling: given 'linear', must be a mapping"),
    "one beta": ("optimizer.betas=[0.9]", "optimizer.betas.1: missing, and it has no default"),
    "three betas": ("optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas: given (0.9, 0.9, 0.9), must have at most 2 entries"),
    "octal": ("training.seed=010", "training.seed: given '010', must be a whole number"),
    "hexadecimal": ("training.seed=0x10", "training.seed: given '0x10', must be a whole number"),
    "minutes": ("training.seed=1:30", "training.seed: given '1:30', must be a whole number"),
    "date": ("training.seed=2020-01-01", "training.seed: given datetime.date(2020, 1, 1), must be a whole number"),
    # values out of range
    "zero layers": ("model.num_layers=0", "model.num_layers: given 0, must be at least 1"),
    "negative size": ("model.hidden_size=-64", "model.hidden_size: given -64, must be at least 1"),
    "absurd depth": ("model.num_layers=1000000000000", "model.num_layers: given 1000000000000, must be at most 65536"),
    "absurd size": ("model.vocab_size=99999999999", "must be at most 2147483647"),
    "negative seed": ("training.seed=-1", "training.seed: given -1, must be at least 0"),
    "zero learning rate": ("optimizer.lr=0", "optimizer.lr: given 0, must be greater than 0"),
    "NaN": ("optimizer.lr=.nan", "optimizer.lr: given nan, must be a finite number"),
    "infinity": ("model.tau=.inf", "model.tau: given inf, must be a finite number"),
    "overflow": ("model.tau=1e400", "model.tau: given inf, must be a finite number"),
    "beta of 1": ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: given 1.0, must be less than 1"),
    "negative weight": ("data.path=[{path: a, weight: -1}]", "data.path.0.weight: given -1, must be greater than 0"),
    "empty blend": ("data.path=[]", "data.path: given [], must have at least 1 entries"),
    "blend without weight": ("data.path=[{path: a}]", "data.path.0.weight: missing, and it has no default"),
    "empty path": ("data.path=''", "data.path: given an empty path"),
    "NUL in a path": ('data.path="a\\0b"', "data.path: the path contains a NUL character"),
    "partial rotary of 0": ("model.partial_rotary_factor=0", "must be greater than 0"),
    "precision": ("training.precision=fp16", "training.precision: given 'fp16', allowed: 'fp32' or 'bf16'"),
    "misspelt choice": ("optimizer.schedule=cosin", "allowed: 'cosine', 'wsd' or 'constant'; did you mean 'cosine'?"),
    "bool for a choice": ("model.qk_norm=no", "model.qk_norm: given False, allowed: 'none' or 'rms'"),
    "device": ("training.device=tpu", "allowed: 'auto', 'cpu' or 'cuda'"),
    # sizes that do not fit together
    "hidden size over heads": ("model.num_heads=6", "hidden_size 64 is not a multiple of num_heads 6; change one of them or give head_dim"),
    "heads over KV heads": ("model.num_kv_heads=3", "num_heads 4 is not a multiple of num_kv_heads 3"),
    "window pattern": ("model.window=8*3", "window pattern '8*3' describes 3 layers, but num_layers is 4"),
    "window pattern grammar": ("model.window=wide", "window pattern 'wide': cannot read 'wide'"),
    "odd rotary channels": ("model.partial_rotary_factor=0.2", "is 3 rotary channels; it must be an even number"),
    "rope scaling": ("model.rope_scaling={rope_type: linear}", "rope_scaling of type 'linear' needs 'factor'"),
    "KV heads over tensor": ("parallel.tensor=4", "model.num_kv_heads 2 is not a multiple of parallel.tensor 4"),
    "sequence over context": ("parallel.context=3", "data.sequence_length 128 is not a multiple of parallel.context 3"),
    "layers over pipeline": ("parallel.pipeline=3", "model.num_layers 4 is not a multiple of parallel.pipeline 3"),
    "batch": ("training.micro_batch_size=3", "training.global_batch_size 8 is not a multiple of training.micro_batch_size 3"),
    "warm-up": ("optimizer.warmup_steps=11", "optimizer.warmup_steps is 11, more than training.steps 10"),
    "min_lr": ("optimizer.min_lr=1.0", "min_lr 1.0 is greater than lr 0.001"),
    "wsd without decay": ("optimizer.schedule=wsd", "schedule wsd needs decay_steps"),
    "decay without wsd": ("optimizer.decay_steps=5", "only schedule wsd reads it, and schedule is cosine"),
    "validation without data": ("training.validate_every=5", "training.validate_every is given, but data.validation is not"),
    # overrides that cannot be read
    "no equals sign": ("training.steps", "override 'training.steps': write section.key=value"),
    "no section": ("steps=3", "override 'steps=3': write section.key=value, such as training.steps=3"),
    "empty key": ("training.=3", "write section.key=value"),
    "below a value": ("data.path.x=3", "data.path is not a mapping; override it as a whole"),
    "YAML in an override": ("training.steps=[1", "override 'training.steps=[1': not valid YAML"),
}


@pytest.mark.parametrize(("override", "expected"), OVERRIDES.values(), ids=OVERRIDES.keys())
def test_one_mistake_gives_one_message(base, override, expected):
    message = message_of(base, override)
    assert expected in message
    assert "\n" not in message and "problems" not in message


SEVERAL = {
    "ffn over tensor": (
        ["model.ffn_hidden_size=129", "parallel.tensor=2"],
        "model.ffn_hidden_size 129 is not a multiple of parallel.tensor 2",
    ),
    "vocabulary over tensor": (
        ["parallel.tensor=3", "model.num_heads=6", "model.num_kv_heads=3", "model.head_dim=16", "model.ffn_hidden_size=96"],
        "vocabulary padded to a multiple of 128, 256 is not a multiple of parallel.tensor 3",
    ),
    "sequence over context and tensor": (
        ["parallel.context=4", "parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=124", "model.window=8"],
        "data.sequence_length 124 is not a multiple of parallel.context 4 x parallel.tensor 2",
    ),
    "layers over pipeline and chunks": (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=3"],
        "model.num_layers 4 is not a multiple of parallel.pipeline 2 x parallel.virtual_pipeline 3",
    ),
    "chunks without pipeline": (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline is given, but parallel.pipeline is 1"),
    "recomputed layers of a run that keeps all": (
        ["training.recompute=selective", "training.recompute_layers=2"],
        "training.recompute_layers is given, but training.recompute is selective",
    ),
    "more recomputed layers than there are": (
        ["training.recompute=full", "training.recompute_layers=3", "parallel.pipeline=2"],
        "training.recompute_layers 3 is more than the 2 layers of a pipeline stage",
    ),
    "sequence without tensor": (["parallel.sequence=true"], "parallel.sequence is true, but parallel.tensor is 1"),
    "min_lr without decay": (
        ["optimizer.schedule=constant", "optimizer.min_lr=0.0001"],
        "min_lr 0.0001 is given, but schedule constant never decays",
    ),
    "wsd longer than the run": (
        ["optimizer.schedule=wsd", "optimizer.warmup_steps=6", "optimizer.decay_steps=5"],
        "optimizer.warmup_steps + optimizer.decay_steps is 11, more than training.steps 10",
    ),
}


@pytest.mark.parametrize(("overrides", "expected"), SEVERAL.values(), ids=SEVERAL.keys())
def test_sizes_of_several_sections_must_fit(base, overrides, expected):
    message = message_of(base, *overrides)
    assert expected in message and "\n" not in message


FILES = {
    "empty": (b"", "the file is empty; it needs the sections model, parallel, data"),
    "comments": (b"# nothing\n", "the file is empty"),
    "list": (b"- a\n- b\n", "the top level is no mapping; it must hold the sections model, parallel"),
    "text": (b"hello\n", "the top level is no mapping"),
    "number": (b"3\n", "the top level is no mapping"),
    "tab": (b"model:\n\tnum_layers: 4\n", "not valid YAML in line 2, column 1"),
    "unclosed": (b"model: {num_layers: 4\n", "not valid YAML in line 2"),
    "two documents": (b"a: 1\n---\nb: 2\n", "not valid YAML"),
    "duplicate key": (b"training:\n  steps: 1\n  seed: 2\n  steps: 3\n", "key 'steps' stands twice, in lines 2 and 4; remove one"),
    "duplicate section": (BASE.encode() + b"model: {}\n", "key 'model' stands twice"),
    "duplicate key in a list": (b"data: {path: [{path: a, path: b}]}\n", "key 'path' stands twice, in lines 1 and 1"),
    "object": (b"model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    "list as key": (b"? [a, b]\n: 1\n", "not valid YAML"),
    "not UTF-8": (b"model: \xff\xfe\n", "not a text file in UTF-8"),
    "NUL": (b"model: \x00\n", "not valid YAML"),
    "enormous number": (b"training: {steps: " + b"9" * 5000 + b"}\n", "not valid YAML"),
    "nested too deeply": (b"[" * 400, "not valid YAML"),
    "section is a text": (b"model: big\n", "model: given 'big', must be a mapping"),
    "section is a list": (BASE.encode() + b"parallel: [2, 2]\n", "parallel: given [2, 2], must be a mapping"),
    "numbers as sections": (BASE.encode() + b"3: {}\n", "3: unknown key"),
    "number as key": (BASE.encode() + b"parallel: {3: 1}\n", "parallel.3: unknown key"),
    "contains itself": (BASE.encode() + b"parallel: &p {tensor: *p}\n", "parallel.tensor"),
}


@pytest.mark.parametrize(("content", "expected"), FILES.values(), ids=FILES.keys())
def test_a_file_that_is_no_configuration(tmp_path, content, expected):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    message = message_of(path)
    assert message.startswith(str(path)) and expected in message


def test_every_missing_section_and_field_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {num_layers: 4}\nlogging:\n")
    message = message_of(path)
    for name in ("model.hidden_size", "model.vocab_size", "data", "training", "optimizer", "logging.directory"):
        assert f"  {name}: missing, and it has no default; add it" in message


def test_a_file_that_is_not_there(base):
    message = message_of(base.with_name("rum.yaml"))
    assert "no such file" in message and "did you mean" in message and "run.yaml" in message
    assert "no such file" in message_of(base.parent / "nowhere" / "run.yaml")


def test_a_directory_instead_of_a_file(tmp_path):
    assert "cannot be read: Is a directory" in message_of(tmp_path)


NASTY = [
    None,
    True,
    0,
    -1,
    3,
    1.5,
    1e308,
    10**400,
    float("nan"),
    float("-inf"),
    "",
    "x",
    "full",
    [],
    [1],
    {},
    {"a": 1},
    {1: 2},
    b"x",
    date(2020, 1, 1),
]
FIELDS = [(name, key) for name, section in RunConfig.model_fields.items() for key in section.annotation.model_fields]


@pytest.mark.parametrize(("section", "key"), FIELDS)
def test_any_value_of_any_field_is_a_configuration_or_a_message(section, key):
    base = yaml.safe_load(BASE)
    for value in NASTY:
        data = copy.deepcopy(base)
        data.setdefault(section, {})[key] = value
        try:
            config = parse_config(data)
        except ConfigError as error:
            assert section in str(error)
        else:
            assert parse_config(config.model_dump(mode="json")) == config
