"""Checks, then times the operator against full attention on this GPU: a table, a JSON file and a plot.

    PYTHONPATH=kernels python kernels/benchmarks/bench.py [--output kernels/benchmarks/results] [--lengths 2048,8192] [--heads 32/8,16/16]

The published composition (published.py) is timed too where fla-core is installed: pip install -e ".[benchmark]". Its kernels tune
themselves for minutes, so it may be timed in a run of its own, beside the operator at the same shapes, that is added to the same files:

    PYTHONPATH=kernels python kernels/benchmarks/bench.py --without-published
    PYTHONPATH=kernels python kernels/benchmarks/bench.py --published-only

Milliseconds are medians between device events. `graph` replays a captured CUDA graph, `eager` includes what the host cannot hide.
The floor is max(FLOP / matrix rate, bytes / copy rate) with both rates measured here:
FLOP = 2 T (K+V) (HQ (M + W) + H M) forward and 2.5 times that backward; bytes = q, k, v, g, out once forward, and
q, k, v, g, out, dout, dq, dk, dv, dg once backward.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from check import check
from check_cases import Case
from compare import require_cuda_device
from published import compile_in_parallel, published_composition, shorten_tuning
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from nha_kernels import explain_dispatch, nha_attention

SLOTS, WINDOW, DIM = 64, 64, 128


@dataclasses.dataclass(frozen=True)
class Rates:
    matrix: float  # FLOP/s, bf16
    copy: float  # bytes/s, read and written


def median_ms(function: Callable[[], Any], budget_ms: float = 400.0) -> float:
    """Median of up to 30 runs after warm-up, fewer where they would take longer than the budget."""
    function()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    count = int(min(30, max(3, budget_ms / max(start.elapsed_time(end), 1e-3))))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in marks:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in marks)[count // 2]


def graphed(function: Callable[[], Any]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure_rates() -> Rates:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matrix = 2 * 8192**3 / (median_ms(lambda: a @ b) * 1e-3)
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / (median_ms(lambda: target.copy_(source)) * 1e-3)
    return Rates(matrix, copy)


def floor_ms(rates: Rates, tokens: int, query_heads: int, kv_heads: int) -> tuple[float, float]:
    """Forward, and forward with backward."""
    flop = 2 * tokens * 2 * DIM * (query_heads * (SLOTS + WINDOW) + kv_heads * SLOTS)
    wide, narrow, gates = 2 * tokens * query_heads * DIM, 2 * tokens * kv_heads * DIM, 4 * tokens * kv_heads * SLOTS
    forward_bytes = 2 * wide + 2 * narrow + gates  # q and out, k and v, g
    backward_bytes = 4 * wide + 4 * narrow + 2 * gates
    forward = max(flop / rates.matrix, forward_bytes / rates.copy)
    return 1e3 * forward, 1e3 * (forward + max(2.5 * flop / rates.matrix, backward_bytes / rates.copy))


def contestants(
    names: list[str], tokens: int, query_heads: int, kv_heads: int
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor], Tensor]]:
    """Name -> forward function, its leaves, gradient of its output."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, DIM, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()

    q, k, v = normal(query_heads), normal(kv_heads), normal(kv_heads)
    z = torch.randn(1, tokens, kv_heads, SLOTS, generator=generator, device="cuda")
    g = (logsigmoid(z) / 8).requires_grad_()
    rope = 10000.0 ** (-torch.arange(0, DIM, 2, device="cuda").double() / DIM)
    gradient = normal(query_heads).detach()

    def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return nha_attention(q, k, v, g, window=WINDOW, rope=rope, backend="triton")

    def full(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                parts = (x.transpose(1, 2) for x in (q, k, v))
                return scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=query_heads != kv_heads).transpose(1, 2)

        return run

    def published() -> Callable[..., Tensor]:
        composition = published_composition(WINDOW, DIM**-0.5)
        assert composition is not None
        return composition

    found: dict[str, tuple[Callable[[], Callable[..., Tensor]], list[Tensor]]] = {
        "nha": (lambda: ours, [q, k, v, g]),
        "cudnn": (lambda: full(SDPBackend.CUDNN_ATTENTION), [q, k, v]),
        "flash": (lambda: full(SDPBackend.FLASH_ATTENTION), [q, k, v]),
        "published": (published, [q, k, v, g]),
    }
    return {name: (found[name][0](), found[name][1], gradient) for name in names}


def time_one(function: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor, graphs: bool) -> dict[str, float]:
    def forward() -> Tensor:
        with torch.no_grad():
            return function(*leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, gradient)

    times = {"forward_eager": median_ms(forward), "both_eager": median_ms(both)}
    if graphs:
        times["forward_graph"] = median_ms(graphed(forward))
        times["both_graph"] = median_ms(graphed(both))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    times["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    return times


def plot(summary: dict[str, Any], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [*summary.get("rows", []), *(row for row in summary.get("published", {}).get("rows", []) if row["name"] == "published")]
    layouts = sorted({row["heads"] for row in rows}, reverse=True)
    figure, axes = pyplot.subplots(1, len(layouts), figsize=(5.5 * len(layouts), 4), squeeze=False)
    for axis, heads in zip(axes[0], layouts, strict=True):
        chosen = [row for row in rows if row["heads"] == heads]
        for name in dict.fromkeys(row["name"] for row in chosen):
            line = [(row["tokens"], row["both_graph" if "both_graph" in row else "both_eager"]) for row in chosen if row["name"] == name]
            other_run = name == "published" and "published" in summary
            axis.plot(*zip(*line, strict=True), marker="o", label=f"{name} (a run of its own)" if other_run else name)
        floor = sorted({row["tokens"]: row["floor_both"] for row in reversed(chosen)}.items())
        axis.plot(*zip(*floor, strict=True), "k:", label="floor")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, forward + backward", title=f"HQ/H {heads}")
        axis.legend()
    figure.suptitle(f"{(summary if 'device' in summary else summary['published'])['device']}, bf16, D 128, M 64, W 64, B 1")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure(names: list[str], layouts: list[tuple[int, int]], lengths: list[int]) -> dict[str, Any]:
    """Everything of one run: rates of the chip, versions, and a row for each contestant and shape."""
    rates = measure_rates()
    device = torch.cuda.get_device_name()
    print(
        f"{device}, torch {torch.__version__}, triton {triton.__version__}: {rates.matrix / 1e12:.0f} TFLOP/s, {rates.copy / 1e12:.2f} TB/s"
    )
    rows: list[dict[str, Any]] = []
    for query_heads, kv_heads in layouts:
        for tokens in lengths:
            floors = floor_ms(rates, tokens, query_heads, kv_heads)
            ours: dict[str, Any] = {}
            for name, (function, leaves, gradient) in contestants(names, tokens, query_heads, kv_heads).items():
                try:
                    times = time_one(function, leaves, gradient, graphs=tokens <= 32768)
                except torch.OutOfMemoryError:
                    print(f"{query_heads}/{kv_heads} T {tokens:>6} {name}: does not fit this GPU", flush=True)
                    continue
                row = {"name": name, "heads": f"{query_heads}/{kv_heads}", "tokens": tokens, **times}
                row |= {"floor_forward": floors[0], "floor_both": floors[1]}
                if name == "nha":
                    row["dispatch"] = explain_dispatch(*leaves, window=WINDOW)
                    ours = row
                rows.append(row)
                print(described(row, ours), flush=True)
            torch.cuda.empty_cache()
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "command": "PYTHONPATH=kernels python kernels/benchmarks/bench.py " + " ".join(sys.argv[1:]),
        "matrix_tflops": rates.matrix / 1e12,
        "copy_tb_per_s": rates.copy / 1e12,
        "shape": {"slots": SLOTS, "window": WINDOW, "key_dim": DIM, "value_dim": DIM, "batch": 1, "dtype": "bfloat16"},
        "rows": rows,
    }


def described(row: dict[str, Any], ours: dict[str, Any]) -> str:
    forward, both = ("forward_graph", "both_graph") if "both_graph" in row else ("forward_eager", "both_eager")
    return (
        f"{row['heads']:>6} T {row['tokens']:>6} {row['name']:<12} forward {row[forward]:8.3f} (eager {row['forward_eager']:8.3f})"
        f"  both {row[both]:8.3f} (eager {row['both_eager']:8.3f})  {row['peak_gb']:6.2f} GB"
        f"  x ours {row[forward] / ours[forward]:6.2f} {row[both] / ours[both]:6.2f}"
        f"  x floor {row[forward] / row['floor_forward']:6.1f} {row[both] / row['floor_both']:6.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--lengths", default="2048,8192,32768,131072")
    parser.add_argument("--heads", default="32/8,16/16", help="query heads / KV heads")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--published-only", action="store_true", help="the published composition and the operator, added to the files")
    which.add_argument("--without-published", action="store_true")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile the published composition")
    arguments = parser.parse_args()
    require_cuda_device()
    layouts = [(int(q), int(kv)) for q, kv in (part.split("/") for part in arguments.heads.split(","))]
    with_published = importlib.util.find_spec("fla") is not None and not arguments.without_published
    if arguments.published_only and not with_published:
        sys.exit("fla-core is not installed: pip install fla-core==0.6.0")
    for query_heads, kv_heads in layouts:
        verdict = check(Case(tokens=1024, kv_heads=kv_heads, group=query_heads // kv_heads))
        if not verdict["passed"] or "refused" in verdict:
            sys.exit(f"the kernels fail their check, so they are not timed: {verdict}")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if with_published:
        began = time.time()
        compile_in_parallel(layouts, WINDOW, SLOTS, DIM, arguments.jobs)
        shorten_tuning()
        print(f"published composition: compiled by {arguments.jobs} processes in {time.time() - began:.0f} s", flush=True)

    names = ["nha", "published"] if arguments.published_only else ["nha", "cudnn", "flash"] + ["published"] * with_published
    result = measure(names, layouts, [int(length) for length in arguments.lengths.split(",")])
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{result['device'].lower().replace(' ', '_')}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if arguments.published_only:  # beside what another run left: its rows stay that run's
        summary = before | {"published": result}
    else:
        summary = result
        if "published" in before and not with_published:
            summary["published"] = before["published"]
    path.write_text(json.dumps(summary, indent=1) + "\n")
    plot(summary, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
