"""Section training.deepspeed: DeepSpeed's own words, inline or from a file, and nothing that another section decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nha_megatron.config import ConfigError, dump_config, load_config
from nha_megatron.config.engines import zero_settings
from nha_megatron.config.inputs import missing_inputs
from tests.config.cases import BASE, run

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def test_stage_1_is_the_default():
    zero = zero_settings(run(training={"engine": "deepspeed"}).training)
    assert zero is not None and zero.stage == 1
    assert zero_settings(run().training) is None


def test_settings_can_be_given_inline(base):
    config = load_config(base, ["training.engine=deepspeed", "training.deepspeed.zero_optimization={stage: 2, reduce_bucket_size: 5e8}"])
    zero = zero_settings(config.training)
    assert zero.stage == 2 and zero.reduce_bucket_size == 500_000_000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_files_that_come_with_the_project(base, stage):
    path = FOLDER / f"zero{stage}.json"
    config = load_config(base, ["training.engine=deepspeed", f"training.deepspeed={path}"])
    assert zero_settings(config.training).stage == stage
    # The resolved configuration needs no other file.
    content = yaml.safe_load(dump_config(config))["training"]["deepspeed"]["zero_optimization"]
    given = json.loads(path.read_text())["zero_optimization"]
    assert given.items() <= content.items()


def zero(**fields):
    return {"zero_optimization": {"stage": 2, **fields}}


REFUSED = {
    "stage 0": ({"zero_optimization": {"stage": 0}}, ["training.deepspeed.zero_optimization.stage", "allowed: 1, 2 or 3"]),
    "no stage": ({"zero_optimization": {}}, ["training.deepspeed.zero_optimization.stage: missing"]),
    "no zero_optimization": ({}, ["training.deepspeed.zero_optimization: missing"]),
    "misspelt": (zero(reduce_buket_size=1), ["reduce_buket_size: unknown key; did you mean 'reduce_bucket_size'"]),
    "not whole": (zero(reduce_bucket_size=0.5), ["reduce_bucket_size: given 0.5, must be a whole number"]),
    "zero elements": (zero(reduce_bucket_size=0), ["reduce_bucket_size: given 0, must be at least 1"]),
    "batch": ({**zero(), "train_batch_size": 8}, ["train_batch_size: training.global_batch_size is the batch; remove it"]),
    "clipping": ({**zero(), "gradient_clipping": 1.0}, ["gradient_clipping: optimizer.clip_grad is the limit; remove it"]),
    "optimizer": ({**zero(), "optimizer": {"type": "Lion"}}, ["optimizer: section `optimizer` describes AdamW; remove it"]),
    "fp16": ({**zero(), "fp16": {"enabled": True}}, ["fp16: not supported, because there is no loss scale; use training.precision bf16"]),
    "offload": (zero(offload_optimizer={"device": "cpu"}), ["offload_optimizer: not supported, because", "use more ranks, or stage 3"]),
    "round robin": (zero(round_robin_gradients=True), ["round_robin_gradients: not supported, because DeepSpeed", "; remove it"]),
    "quantized": (zero(zero_quantized_gradients=True), ["zero_quantized_gradients: not supported, because the loss"]),
    "two at once": ({**zero(), "bf16": {}, "wandb": {}}, ["bf16: training.precision chooses it", "wandb: section `logging`"]),
    "list": ([1], ["training.deepspeed: given [1], must be a mapping"]),
    "no such file": ("nowhere.json", ["'nowhere.json' cannot be read: No such file or directory; give a JSON file such as"]),
}


@pytest.mark.parametrize(("settings", "parts"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(settings, parts):
    with pytest.raises(ConfigError) as refusal:
        run(training={"engine": "deepspeed", "deepspeed": settings})
    for part in parts:
        assert part in str(refusal.value)


def test_what_a_file_switches_off_is_no_reason_to_refuse_it():
    off = {**zero(round_robin_gradients=False, offload_optimizer={"device": "none"}, cpu_offload=None), "fp16": {"enabled": False}}
    assert run(training={"engine": "deepspeed", "deepspeed": off}) == run(training={"engine": "deepspeed", "deepspeed": zero()})


@pytest.mark.parametrize(("content", "part"), [("{", "is not JSON: .*; write it like what"), ("[]", "holds no JSON object")])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, part):
    path = tmp_path / "zero.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=part):
        run(training={"engine": "deepspeed", "deepspeed": str(path)})


def test_settings_that_the_run_would_not_use_are_refused():
    with pytest.raises(ConfigError, match=r"training\.deepspeed is given, but training\.engine is megatron"):
        run(training={"deepspeed": zero()})


def test_the_missing_package_is_named_before_anything_starts(monkeypatch):
    monkeypatch.setattr("nha_megatron.config.inputs.find_spec", lambda name: None)
    assert any("pip install 'nha-megatron[deepspeed]'" in line for line in missing_inputs(run(training={"engine": "deepspeed"})))
    assert not any("pip" in line for line in missing_inputs(run()))
