#!/usr/bin/env python3
"""Predicts the time of one attention layer over context ranks from measurements in this repository and a network that is assumed:

    python tools/predict_context_parallel.py [--adapter-gb-per-s 45] [--rails 8] [--gather ring] [--output PNG]

First the model (`nha_megatron/layers/nha/context_parallel/time.py`) predicts the times measured on two GPUs, and those of each run named by
--more-gpus, from the operator and the summary on two. Only if it is within 15 % of each does it go on to more ranks. Tables go to stdout,
the figure to --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from nha_megatron.config import ConfigError, ModelConfig
from nha_megatron.hardware.measured import MeasuredTimes
from nha_megatron.hardware.network import Gather, Link, Network
from nha_megatron.layers.kind import RankShape
from nha_megatron.layers.nha.context_parallel.cost import summary_bytes
from nha_megatron.layers.nha.context_parallel.time import LayerCost, LayerRates, nha_layer_cost
from nha_megatron.layers.nha.full.time import full_layer_ms

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "kernels" / "benchmarks" / "results"
TWO_GPUS = REPOSITORY / "docs" / "results" / "context_parallel_two_nvidia_h200.json"
FOUR_GPUS = REPOSITORY / "docs" / "results" / "context_parallel_four_nvidia_h200.json"
ALLOWED_ERROR = 0.15

# (ranks, tokens a rank): 1M tokens in three ways, 4M and 8M over 64 ranks.
TABLE = [(2, 65536), (8, 131072), (16, 65536), (64, 16384), (64, 65536), (64, 131072)]
FIGURE_RANKS = [2, 4, 8, 16, 32, 64]

# Okabe-Ito colours: told apart without red-green vision.
COLOURS = {16384: "#D55E00", 65536: "#0072B2", 131072: "#009E73"}


# What sums up the slots, forward and backward, as the run on two GPUs lists it; the others take the same time at any length.
SUMMARY_KERNELS = (
    "sum_log_gates",
    "summarise_segments",
    "compose_summary",
    "summary_backward_segments",
    "summary_backward_gates",
    "summary_backward_tokens",
)
OVER_ALL_TOKENS = {
    "usual": ("sum_log_gates", "summary_backward_tokens"),
    "slow": ("sum_log_gates", "summary_backward_tokens", "summarise_segments", "summary_backward_gates"),
}


@dataclass(frozen=True)
class Measurements:
    """What the files in the repository say; milliseconds forward and backward."""

    model: ModelConfig
    window: int
    gates: str
    ranks: int
    over_ranks: dict[int, float]  # tokens a rank -> the layer over the ranks
    one_rank: MeasuredTimes  # the operator in the same run
    summary: MeasuredTimes  # in the same run at the first length; longer ones by what each kernel goes over
    copy_tb_per_s: float  # another GPU, which is slower
    full_attention: MeasuredTimes  # that GPU


def read_measurements(several_gpus: Path, operator: Path) -> Measurements:
    """Raises `ConfigError` when a file is missing or is not what the benchmark of that name writes."""
    run, benchmark = _read_json(several_gpus), _read_json(operator)
    try:
        layer, rows = run["layer"], run["rows"]
        if run["ranks"] < 2 or layer["dtype"] != "torch.bfloat16" or layer["window"] is None:
            raise ConfigError(f"{several_gpus} is not of a windowed layer in bf16 over several ranks")
        lengths = tuple(row["tokens_per_rank"] for row in rows)
        heads = f"{layer['heads']}/{layer['kv_heads']}"
        shape = benchmark["shape"]
        if (shape["slots"], shape["window"], shape["key_dim"]) != (layer["slots"], layer["window"], layer["head_dim"]):
            raise ConfigError(f"{operator} is of another layer than {several_gpus}: {shape}, not {layer}")
        return Measurements(
            model=ModelConfig(
                num_layers=1,
                hidden_size=layer["heads"] * layer["head_dim"],
                ffn_hidden_size=1,
                num_heads=layer["heads"],
                num_kv_heads=layer["kv_heads"],
                head_dim=layer["head_dim"],
                num_slots=layer["slots"],
                vocab_size=1,
            ),
            window=layer["window"],
            gates=layer["gates"],
            ranks=run["ranks"],
            over_ranks={row["tokens_per_rank"]: row["all_ranks_ms"] for row in rows},
            one_rank=MeasuredTimes(lengths, tuple(row["one_rank_ms"] for row in rows)),
            summary=_summary_times(run["kernels"], lengths[0], OVER_ALL_TOKENS[layer["gates"]]),
            copy_tb_per_s=benchmark["copy_tb_per_s"],
            full_attention=_full_attention_times(benchmark["rows"], heads),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{several_gpus} or {operator} lacks {error}: give the files that the benchmarks write") from None


def _full_attention_times(rows: list[dict[str, Any]], heads: str) -> MeasuredTimes:
    """Under CUDA graphs where there is such a time: the host is then out of the way, as the model has it."""
    chosen = [row for row in rows if (row["name"], row["heads"]) == ("cudnn", heads)]
    return MeasuredTimes(
        tuple(row["tokens"] for row in chosen), tuple(row["both_graph"] if "both_graph" in row else row["both_eager"] for row in chosen)
    )


def _summary_times(kernels: list[dict[str, Any]], tokens: int, over_all_tokens: Sequence[str]) -> MeasuredTimes:
    listed = {kernel["name"]: kernel["ms"] for kernel in kernels}
    once = sum(listed[name] for name in SUMMARY_KERNELS)
    return MeasuredTimes((tokens, 2 * tokens), (once, once + sum(listed[name] for name in over_all_tokens)))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no object: give the file that the benchmark writes")
    return content


def predict_run(measured: Measurements, rates: LayerRates, network: Network) -> dict[int, LayerCost]:
    """What the model says of a run: tokens a rank -> cost."""
    return {
        tokens: nha_layer_cost(measured.model, measured.window, tokens, measured.ranks, rates, network) for tokens in measured.over_ranks
    }


class Extrapolation:
    """The layer over more ranks than were measured, with operator and summary as measured on one GPU of that run."""

    def __init__(self, measured: Measurements, network: Network, gather: Gather, small_kernels_ms: float) -> None:
        self.measured, self.network, self.gather = measured, network, gather
        self.rates = LayerRates(measured.one_rank, measured.summary, measured.copy_tb_per_s, small_kernels_ms)

    def cost(self, ranks: int, tokens: int, rails: int | None = None) -> LayerCost:
        network = self.network if rails is None else dataclasses.replace(self.network, rails=rails)
        measured, gather = self.measured, self.gather
        return nha_layer_cost(measured.model, measured.window, tokens, ranks, self.rates, network, gather=gather)

    def full_ms(self, ranks: int, tokens: int) -> float:
        return full_layer_ms(self.measured.model, tokens, ranks, self.measured.full_attention, self.network)


def validation_table(runs: Sequence[tuple[Measurements, dict[int, LayerCost]]]) -> str:
    lines = ["| tokens a rank | ranks | measured, ms | predicted, ms | error | of it network |", "|---|---|---|---|---|---|"]
    for measured, predicted in runs:
        for tokens, cost in predicted.items():
            time = measured.over_ranks[tokens]
            share = f"{cost.total / time - 1:+.1%} | {cost.network / cost.total:.1%}"
            lines.append(f"| {tokens:,} | {measured.ranks} | {time:.2f} | {cost.total:.2f} | {share} |")
    return "\n".join(lines)


def extrapolation_table(model: Extrapolation) -> str:
    lines = [
        "| tokens | ranks x tokens | operator | summary | copies | composition | small | network | sum | efficiency (1 adapter) | `full` |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks, tokens in TABLE:
        cost, cautious = model.cost(ranks, tokens), model.cost(ranks, tokens, rails=1)
        parts = " | ".join(f"{part:.2f}" for part in dataclasses.astuple(cost))
        lines.append(
            f"| {_short(ranks * tokens)} | {ranks} x {tokens:,} | {parts} | {cost.total:.1f} |"
            f" {cost.efficiency:.0%} ({cautious.efficiency:.0%}) | {model.full_ms(ranks, tokens):,.0f} |"
        )
    return "\n".join(lines)


def gather_or_scan(model: Extrapolation, ranks: int) -> str:
    """What another algorithm would gain where the gather costs most."""
    one_piece = summary_bytes(model.measured.model, model.measured.model.num_slots, RankShape(sequence_length=ranks, context=ranks))
    gather, scan = model.network.all_gather_ms(one_piece, ranks, model.gather), model.network.scan_ms(one_piece, ranks)
    return f"Gradients of slots over {ranks} ranks: all-gather {gather:.2f} ms, log-step scan (not built) {scan:.2f} ms"


def _short(tokens: int) -> str:
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 2**10}k"


def draw(predictions: list[tuple[Measurements, dict[int, LayerCost]]], model: Extrapolation, output: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(2, 3))
    validated = [(run.ranks, tokens, run.over_ranks[tokens], cost.total) for run, costs in predictions for tokens, cost in costs.items()]
    for offset, colour, name, times in (
        (-0.2, "#999999", "measured", [measured for *_, measured, _ in validated]),
        (0.2, "#56B4E9", "model", [predicted for *_, predicted in validated]),
    ):
        bars = left.bar([index + offset for index in range(len(times))], times, width=0.38, color=colour, label=name)
        left.bar_label(bars, fmt="%.2f", fontsize=8)
    left.set_xticks(range(len(validated)), [f"{ranks} x {tokens:,}" for ranks, tokens, *_ in validated], fontsize=8)
    left.set_xlabel("ranks x tokens")
    left.set_ylabel("layer, forward and backward (ms)")
    left.set_title("Validated: ranks over NVLink", fontsize=10)
    left.set_ylim(0, 1.25 * max(measured for *_, measured, _ in validated))  # room for the legend
    left.legend(frameon=False, loc="upper left")

    for tokens, colour in COLOURS.items():
        many, one = ([model.cost(ranks, tokens, rails).efficiency for ranks in FIGURE_RANKS] for rails in (None, 1))
        right.plot(FIGURE_RANKS, many, color=colour, linestyle="--", marker="o", markersize=3, label=f"{tokens:,} tokens a rank")
        right.fill_between(FIGURE_RANKS, one, many, color=colour, alpha=0.15, linewidth=0)
    for run, _ in predictions:
        for tokens, over_ranks in run.over_ranks.items():
            right.scatter([run.ranks], [run.one_rank.at(tokens) / over_ranks], marker="x", color=COLOURS.get(tokens, "#000000"), zorder=3)
    right.scatter([], [], marker="x", color="#000000", label="measured")
    right.set_xscale("log", base=2)
    right.set_xticks(FIGURE_RANKS)
    right.xaxis.set_major_formatter(ScalarFormatter())
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_ylim(0, 1)
    right.set_xlabel("context ranks")
    right.set_ylabel("efficiency of weak scaling")
    right.set_title(f"By the model: {model.network.rails} adapters a node (shaded: 1)", fontsize=10)
    right.legend(frameon=False, loc="lower left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.set_axisbelow(True)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predict the time of one layer over context ranks.")
    parser.add_argument("--two-gpus", type=Path, default=TWO_GPUS, metavar="JSON")
    parser.add_argument(
        "--more-gpus", type=Path, nargs="+", metavar="JSON", help="the same benchmark over more ranks; by default that over four ranks"
    )
    parser.add_argument("--operator", type=Path, default=RESULTS / "nvidia_h100_80gb_hbm3.json", metavar="JSON")
    parser.add_argument("--small-kernels-us", type=float, default=40.0, help="some 20 of 2 us each (default: %(default)s)")
    parser.add_argument("--nvlink-gb-per-s", type=float, default=300.0, help="each way, two thirds of 450 (default: %(default)s)")
    parser.add_argument("--nvlink-us", type=float, default=3.4, help="latency of a hop, as NCCL's tuner has it (default: %(default)s)")
    parser.add_argument("--adapter-gb-per-s", type=float, default=45.0, help="each way, 400 Gb/s less 10 %% (default: %(default)s)")
    parser.add_argument("--adapter-us", type=float, default=14.0, help="latency of a hop, as NCCL's tuner has it (default: %(default)s)")
    parser.add_argument("--start-us", type=float, default=8.4, help="of a collective, as NCCL's tuner has it (default: %(default)s)")
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--rails", type=int, default=8, help="adapters of a node that one ring uses at once (default: %(default)s)")
    parser.add_argument("--gather", choices=["ring", "doubling"], default="ring")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "results" / "context_parallel_cost.png", metavar="PNG")
    arguments = parser.parse_args(argv)
    try:
        network = Network(
            inside=Link(arguments.nvlink_gb_per_s, arguments.nvlink_us),
            across=Link(arguments.adapter_gb_per_s, arguments.adapter_us),
            ranks_per_node=arguments.ranks_per_node,
            rails=arguments.rails,
            start_us=arguments.start_us,
        )
        more = arguments.more_gpus or ([FOUR_GPUS] if arguments.two_gpus.resolve() == TWO_GPUS.resolve() else [])
        runs = [read_measurements(path, arguments.operator) for path in (arguments.two_gpus, *more)]
        measured = runs[0]
        if measured.ranks != 2 or any(
            (run.model, run.window, run.gates) != (measured.model, measured.window, measured.gates) for run in runs
        ):
            raise ConfigError(
                f"{arguments.two_gpus} must be of two ranks, and the runs of --more-gpus of the same layer with the same gates"
            )
        model = Extrapolation(measured, network, arguments.gather, arguments.small_kernels_us * 1e-3)
        predictions = [(run, predict_run(run, model.rates, network)) for run in runs]
        table = extrapolation_table(model)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Validated: ranks over NVLink\n\n{validation_table(predictions)}\n")
    errors = [
        (cost.total / run.over_ranks[tokens] - 1, f"at {tokens} tokens a rank over {run.ranks}")
        for run, predicted in predictions
        for tokens, cost in predicted.items()
    ]
    worst, where = max(errors, key=lambda error: abs(error[0]))
    if abs(worst) > ALLOWED_ERROR:
        print(f"error: {worst:+.1%} {where}, allowed {ALLOWED_ERROR:.0%}: nothing is extrapolated", file=sys.stderr)
        return 1
    print(f"Not measured: more ranks (all-gather by {arguments.gather}); milliseconds\n\n{table}\n")
    print(f"{gather_or_scan(model, FIGURE_RANKS[-1])}\n")
    draw(predictions, model, arguments.output)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
