"""`tools/benchmark_training.py` on two gloo ranks: it checks, times and compares every layout, and goes on when memory runs out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankPool
from tools.benchmark_training import RanksDisagree, Setting, all_ranks_arrive, main, series, weak_scaling

MODEL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "num_slots": 4, "window": 6}
TINY = ["--set", *(f"model.{name}={value}" for name, value in MODEL.items()), "model.vocab_size=100"]
TINY += ["training.precision=fp32", "training.device=cpu"]


def run(ranks: RankPool, *arguments: str) -> None:
    assert ranks.run(2, "tools.benchmark_training:main", argv=["--steps", "1", *arguments, *TINY]) == [0, 0]


def test_every_layout_and_length_is_timed_and_compared(ranks: RankPool, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    run(ranks, "--tokens", "64", "128", "--output", str(output))
    result = json.loads(output.read_text())

    # Beside what is asked for, context size 1 with half of the tokens: as many a rank as over two.
    assert [(row["context"], row["tokens"], row["data"]) for row in result["rows"]] == [
        (2, 64, 1),
        (2, 128, 1),
        (1, 32, 2),
        (1, 64, 2),
        (1, 128, 2),
    ]
    for row in result["rows"]:
        assert row["tokens_per_second_per_gpu"] == pytest.approx(1e3 * row["tokens_per_rank"] / row["step_ms"])
        assert row["recompute"] == "none" and len(row["losses"]) == 2 and row["peak_bytes"] > 0
        # Halo of 6 tokens: keys and values of 8 channels and 4 log-gates for 2 heads; one piece of slots: 1 + 16 channels. Any length.
        assert row["bytes_sent_per_layer"] == ({} if row["context"] == 1 else {"6": 6 * 2 * (2 * 8 + 4) * 4 + 2 * 4 * 17 * 4})
    assert [(pair["context"], pair["tokens_per_rank"]) for pair in result["weak_scaling"]] == [(2, 32), (2, 64)]
    assert result["first_step"]["1"]["loss"] == pytest.approx(result["first_step"]["2"]["loss"], rel=2e-6)
    assert result["environment"]["ranks"] == 2 and result["environment"]["command"] and result["environment"]["commit"]


def test_packed_documents_under_full_recomputation(ranks: RankPool, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    run(ranks, "--tokens", "64", "--context", "2", "--recompute", "full", "--document-tokens", "20", "--output", str(output))
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["context"], row["recompute"]) == (2, "full")


@pytest.mark.parametrize(
    ("documents", "compared"),
    [
        ([], False),
        pytest.param(["--document-tokens", "16"], True, marks=pytest.mark.slow),
        pytest.param(["--document-tokens", "48"], False, marks=pytest.mark.slow),  # one rank's sequence of 32 tokens cuts them
    ],
    ids=["one", "packed", "cut"],
)
def test_hybrid_stacks_are_compared_where_documents_are_as_long(
    ranks: RankPool, tmp_path: Path, documents: list[str], compared: bool
) -> None:
    output = tmp_path / "result.json"
    hybrid = ["--set", *TINY[1:], 'model.window="6,full"', "model.empty_slots=weight"]
    arguments = ["--steps", "1", "--tokens", "64", *documents, "--output", str(output), *hybrid]
    assert ranks.run(2, "tools.benchmark_training:main", argv=arguments) == [0, 0]
    result = json.loads(output.read_text())
    assert [(row["context"], row["tokens"]) for row in result["rows"]] == [(2, 64), (1, 32), (1, 64)]
    assert set(result["rows"][0]["bytes_sent_per_layer"]) == {"6", "full"}
    assert len(result["weak_scaling"]) == compared


def test_lengths_that_do_not_divide_are_refused_before_anything_runs(ranks: RankPool) -> None:
    assert ranks.run(2, "tools.benchmark_training:main", argv=["--tokens", "63", *TINY]) == [2, 2]
    assert ranks.run(2, "tools.benchmark_training:main", argv=["--tokens", "64", "--document-tokens", "0", *TINY]) == [2, 2]


def different_losses(argv: list[str]) -> int:
    from tools import benchmark_training

    step = benchmark_training.Bench.first_step

    def shifted(self: Any, setting: Setting, sequences: int) -> tuple[float, float]:
        loss, norm = step(self, setting, sequences)
        return loss * (1 + 1e-4 * (setting.context - 1)), norm

    benchmark_training.Bench.first_step = shifted  # type: ignore[method-assign]
    try:
        return benchmark_training.main(argv)
    finally:
        benchmark_training.Bench.first_step = step  # type: ignore[method-assign]


def test_nothing_is_timed_when_layouts_disagree(ranks: RankPool, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    assert ranks.run(2, different_losses, argv=["--tokens", "64", "--output", str(output), *TINY]) == [2, 2]
    assert not output.exists()


def ended_in_the_second_row(argv: list[str]) -> int:
    from tools import benchmark_training

    measure, calls = benchmark_training.Bench.measure, []

    def ending(self: Any, setting: Setting, steps: int) -> dict[str, Any]:
        calls.append(setting)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, setting, steps)

    benchmark_training.Bench.measure = ending  # type: ignore[method-assign]
    try:
        return benchmark_training.main(argv)
    except KeyboardInterrupt:
        return 130
    finally:
        benchmark_training.Bench.measure = measure  # type: ignore[method-assign]


def test_rows_are_kept_when_the_program_is_ended(ranks: RankPool, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    assert ranks.run(2, ended_in_the_second_row, argv=["--tokens", "64", "--output", str(output), *TINY]) == [130, 130]
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["context"], row["tokens"]) == (2, 64) and row["step_ms"] > 0


def test_memory_that_runs_out_is_reported_and_recomputation_tried() -> None:
    recovered: list[None] = []

    def measure(setting: Setting) -> dict[str, Any]:
        if setting.tokens > {"none": 100, "full": 200}[setting.recompute]:
            raise torch.OutOfMemoryError("made up")
        return {"step_ms": float(setting.tokens)}

    rows = list(series(1, [400, 100, 200, 800], lambda context, tokens: ("none", "full"), measure, lambda: recovered.append(None)))
    assert [(row["tokens"], row["recompute"], row.get("step_ms")) for row in rows] == [
        (100, "none", 100.0),
        (200, "full", 200.0),
        (400, None, None),
        (800, None, None),
    ]
    assert rows[1]["out_of_memory_with_recompute"] == ["none"] and rows[2]["out_of_memory_with_recompute"] == ["none", "full"]
    assert rows[3]["not_tried"] == "a shorter sequence did not fit" and len(recovered) == 3


def some_arrive(ranks: list[int]) -> bool | None:
    return all_ranks_arrive("event", dist.get_world_size(), 1.0) if dist.get_rank() in ranks else None


def test_ranks_learn_whether_all_ran_out_of_memory(ranks: RankPool) -> None:
    assert ranks.run(2, some_arrive, ranks=[0, 1]) == [True, True]
    assert ranks.run(2, some_arrive, ranks=[1]) == [None, False]


def test_a_series_ends_where_ranks_disagree() -> None:
    def measure(setting: Setting) -> dict[str, Any]:
        raise torch.OutOfMemoryError("made up")

    def disagree() -> None:
        raise RanksDisagree

    (row,) = series(1, [100, 200], lambda context, tokens: ("none", "full"), measure, disagree)
    assert row["out_of_memory_with_recompute"] == ["none"] and row["out_of_memory_on"] == "some ranks"


def test_only_steps_with_the_same_work_a_rank_are_compared() -> None:
    row = {"context": 1, "tokens": 8, "tokens_per_rank": 8, "recompute": "full", "step_ms": 90.0}
    over_two = {"context": 2, "tokens": 16, "tokens_per_rank": 8, "step_ms": 100.0}
    (pair,) = weak_scaling([row, {**over_two, "recompute": "full"}, {**over_two, "recompute": "none"}], num_layers=5)
    assert pair["efficiency"] == 0.9 and pair["not_hidden_ms"] == 10.0 and pair["not_hidden_ms_per_layer"] == 2.0


def test_without_torchrun_it_says_how_to_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2 and "torchrun --nproc-per-node=2" in capsys.readouterr().err
