"""A kind that nha_megatron does not know, in a stack beside NHA layers: everything works through the public seam.

The kind lives in tests/layers/running_mean/. Not one line of nha_megatron/ is written for it.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from nha_megatron.config import ConfigError, load_config, save_resolved, with_overrides
from nha_megatron.estimate.counts import num_parameters, state_bytes
from nha_megatron.estimate.report import check_report
from nha_megatron.hf.export import export_to_hf
from nha_megatron.layers import registry
from nha_megatron.layers.registry import kind_named, register_kind
from nha_megatron.model.weights import model_weights
from tests.config.cases import run as small_config
from tests.distributed import RankPool
from tests.engine.programs import tiny_config
from tests.engine.test_parallel_parity import assert_same_training, join_stages
from tests.layers.running_mean import programs
from tests.layers.running_mean.kind import KIND, RunningMeanKind
from tests.training.small_run import metrics, settings, write_corpus

# Four layers: windows 16 and 3 of model.window, and two widths of the running mean.
STACK = {"layers": "nha,running_mean,nha:3,running_mean:16"}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "dp2": (2, {}),
    "tp2_cp2": (4, {"tensor": 2, "context": 2}),
}


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool) -> Callable[[bool], dict[str, Any]]:
    @functools.cache
    def run(documents: bool) -> dict[str, Any]:
        return ranks.run(1, programs.train, sections={"model": STACK}, documents=documents)[0]

    return run


@pytest.mark.parametrize(
    ("layout", "documents"),
    [("tp2", False), ("tp2_sp", False), ("pp2", False), ("cp2", False), ("cp2", True), ("dp2", False)]
    + [pytest.param("tp2_cp2", documents, marks=pytest.mark.slow) for documents in (False, True)],
)
def test_it_trains_like_one_rank(ranks: RankPool, one_rank: Callable[[bool], dict[str, Any]], layout: str, documents: bool) -> None:
    world, parallel = LAYOUTS[layout]
    results = ranks.run(world, programs.train, sections={"model": STACK, "parallel": parallel}, documents=documents)
    assert_same_training(join_stages(results), one_rank(documents))


@pytest.mark.parametrize(("saved", "loaded"), [("tp2", "pp2"), pytest.param("cp2", "tp2", marks=pytest.mark.slow)])
def test_its_checkpoint_continues_in_another_layout(ranks: RankPool, tmp_path: Path, saved: str, loaded: str) -> None:
    world, parallel = LAYOUTS[saved]
    (expected, *_) = ranks.run(world, programs.train_and_save, parallel=parallel, folder=str(tmp_path), model=STACK)
    world, parallel = LAYOUTS[loaded]
    for _, losses in ranks.run(world, programs.load_and_train, parallel=parallel, folder=str(tmp_path), model=STACK):
        assert losses == pytest.approx(expected[2:], rel=5e-5)  # as for NHA alone: fp32 in another order


def test_a_run_reports_its_statistics_and_its_export_is_refused_with_the_reason(ranks: RankPool, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    plain = settings(
        tmp_path, model={"layers": "nha,running_mean"}, training={"steps": 2}, checkpoint={"every": 2}, logging={"layer_statistics": 2}
    )
    assert ranks.run(1, programs.pretrain, plain=plain) == [None]
    record = metrics(tmp_path)[-1]
    assert record["slot_share"][1] is None and 0 < record["slot_share"][0] < 1
    assert record["mean_forget"][0] is None and 0 < record["mean_forget"][1] < 1
    with pytest.raises(ConfigError, match=r"layer\(s\) 1 of kind 'running_mean' have no Hugging Face form"):
        export_to_hf(tmp_path / "run", tmp_path / "exported", with_tokenizer=False)
    assert not (tmp_path / "exported").exists()


def test_check_counts_it() -> None:
    plain, mixed = small_config(), small_config(model={"layers": "nha*3,running_mean:32"}, parallel={"context": 2})
    nha = num_parameters(plain.model) - num_parameters(small_config(model={"num_layers": 3}).model)
    # v and f of 32 channels and f's bias, the output projection, the scale; MLP and two norms of the block.
    own = 3 * 32 * 64 + 32 + 64 + 3 * 64 * 128 + 2 * 64
    assert num_parameters(plain.model) - num_parameters(mixed.model) == nha - own
    assert state_bytes(plain.model, 128) - state_bytes(mixed.model, 128) == state_bytes(plain.model, 128) // 4 - 4 * 32
    report = check_report(mixed)
    assert f"parameters: {num_parameters(mixed.model):,}" in report
    assert "layers: 3 x nha:16, running_mean:32" in report


def test_its_fields_stand_in_a_section_of_its_own(tmp_path: Path) -> None:
    config = small_config(model={"layers": "running_mean,nha", "running_mean": {"width": 48}})
    assert config.model.stack[0].options.width == 48
    assert with_overrides(config, ["model.running_mean.width=24"]).model.stack[2].options.width == 24
    save_resolved(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config and again.model.running_mean.longest == 16.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"layers": "running_maen"}, "there is no layer kind 'running_maen', known are nha, running_mean; did you mean 'running_mean'?"),
        ({"layers": "nha,running_mean", "running_mean": {"widht": 3}}, "model.running_mean.widht: unknown key; did you mean 'width'?"),
        ({"layers": "nha,running_mean", "running_mean": {"width": 0}}, "model.running_mean.width: given 0, must be at least 1"),
        ({"running_mean": {"width": 8}}, "running_mean is given, but no layer of layers 'nha' is of this kind"),
        ({"layers": "running_mean:full,nha"}, "running_mean:full is not known; write running_mean, or running_mean:WIDTH"),
        ({"layers": "running_mean*3,full"}, "running_mean:full is not known"),
        ({"layers": "nha,,nha"}, "cannot read ''"),
        ({"layers": "nha*0"}, "count of 0"),
        ({"layers": "nha*3"}, "describes 3 layers, but num_layers is 4"),
        ({"runing_mean": {"width": 8}}, "model.runing_mean: unknown key"),
    ],
)
def test_what_does_not_fit_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        small_config(model=model)
    assert message in str(refusal.value)


def test_a_size_that_tensor_ranks_cannot_split_is_refused_by_the_kind() -> None:
    with pytest.raises(ConfigError, match=r"model.running_mean.width 31 is not a multiple of parallel.tensor 2"):
        small_config(model={"layers": "running_mean:31"}, parallel={"tensor": 2})


def test_its_weights_start_and_decay_as_the_kind_says(ranks: RankPool) -> None:
    table = model_weights(tiny_config(model=STACK).model)
    started = ranks.run(1, programs.train, sections={"model": STACK}, steps=0)[0]["weights"]
    assert {name: tuple(weight.shape) for name, weight in started.items()} == {name: weight.shape for name, weight in table.items()}
    bias = "decoder.layers.1.self_attention.linear_forget.bias"
    assert not table[bias].decayed and table[bias.replace("bias", "weight")].decayed
    assert len(torch.unique(started[bias])) > 1, "not set to one or zero for being a vector"


def test_names_are_unique_and_usable() -> None:
    register_kind(RunningMeanKind())  # the same kind again
    assert kind_named("running_mean") is KIND == pickle.loads(pickle.dumps(KIND))
    for name in ("running_mean", "nha", "full", "Mean", "2d", "a:b"):
        other = type("Other", (RunningMeanKind,), {"name": name})()
        with pytest.raises(ValueError, match=r"known already|cannot be named"):
            register_kind(other)


def test_an_installed_package_offers_a_kind_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("offered", "tests.layers.test_new_kind:OFFERED", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "_offered", lambda: {"offered": point})
    assert kind_named("offered") is OFFERED
    assert small_config(model={"layers": "offered:8,nha", "offered": {"width": 4}}).model.stack[0].options.width == 8


class OfferedKind(RunningMeanKind):
    name = "offered"

    def options(self, model: Any, argument: str | None, layer: int) -> Any:
        return super().options(type("Sections", (), {"running_mean": model.offered}), argument, layer)


OFFERED = OfferedKind()
