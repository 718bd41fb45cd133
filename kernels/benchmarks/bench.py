"""Checks, then times the operator against full attention on this GPU: a table, a JSON file and a plot.

    PYTHONPATH=kernels python kernels/benchmarks/bench.py [--output kernels/benchmarks/results] [--lengths 2048,8192] [--heads 32/8,16/16]

The published composition (published.py) is timed too where fla-core is installed: pip install -e ".[benchmark]".

Milliseconds are medians between device events. `graph` replays a captured CUDA graph, `eager` includes what the host cannot hide.
The floor is max(FLOP / matrix rate, bytes / copy rate) with both rates measured here:
FLOP = 2 T (K+V) (HQ (M + W) + H M) forward and 2.5 times that backward; bytes = q, k, v, g, out once forward, and
q, k, v, g, out, dout, dq, dk, dv, dg once backward.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from check import check
from check_cases import Case
from published import published_composition
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


def contestants(tokens: int, query_heads: int, kv_heads: int) -> dict[str, tuple[Callable[..., Tensor], list[Tensor], Tensor]]:
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

    found: dict[str, tuple[Callable[..., Tensor], list[Tensor], Tensor]] = {
        "nha": (ours, [q, k, v, g], gradient),
        "cudnn": (full(SDPBackend.CUDNN_ATTENTION), [q, k, v], gradient),
        "flash": (full(SDPBackend.FLASH_ATTENTION), [q, k, v], gradient),
    }
    published = published_composition(WINDOW, DIM**-0.5)
    if published is not None:
        found["published"] = (published, [q, k, v, g], gradient)
    return found


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


def plot(rows: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layouts = sorted({row["heads"] for row in rows}, reverse=True)
    figure, axes = pyplot.subplots(1, len(layouts), figsize=(5.5 * len(layouts), 4), squeeze=False)
    for axis, heads in zip(axes[0], layouts, strict=True):
        chosen = [row for row in rows if row["heads"] == heads]
        for name in dict.fromkeys(row["name"] for row in chosen):
            line = [(row["tokens"], row["both_graph" if "both_graph" in row else "both_eager"]) for row in chosen if row["name"] == name]
            axis.plot(*zip(*line, strict=True), marker="o", label=name)
        floor = sorted({(row["tokens"], row["floor_both"]) for row in chosen})
        axis.plot(*zip(*floor, strict=True), "k:", label="floor")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, forward + backward", title=f"HQ/H {heads}")
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--lengths", default="2048,8192,32768,131072")
    parser.add_argument("--heads", default="32/8,16/16")
    arguments = parser.parse_args()
    layouts = [tuple(map(int, part.split("/"))) for part in arguments.heads.split(",")]
    for query_heads, kv_heads in layouts:
        verdict = check(Case(tokens=1024, kv_heads=kv_heads, group=query_heads // kv_heads))
        if not verdict["passed"] or "refused" in verdict:
            sys.exit(f"the kernels fail their check, so they are not timed: {verdict}")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False

    rates = measure_rates()
    device = torch.cuda.get_device_name()
    print(
        f"{device}, torch {torch.__version__}, triton {triton.__version__}: {rates.matrix / 1e12:.0f} TFLOP/s, {rates.copy / 1e12:.2f} TB/s"
    )
    rows: list[dict[str, Any]] = []
    for query_heads, kv_heads in layouts:
        for tokens in map(int, arguments.lengths.split(",")):
            floors = floor_ms(rates, tokens, query_heads, kv_heads)
            for name, (function, leaves, gradient) in contestants(tokens, query_heads, kv_heads).items():
                try:
                    times = time_one(function, leaves, gradient, graphs=tokens <= 32768)
                except torch.OutOfMemoryError:
                    print(f"{query_heads}/{kv_heads} T {tokens:>6} {name}: does not fit this GPU", flush=True)
                    continue
                row = {"name": name, "heads": f"{query_heads}/{kv_heads}", "tokens": tokens, **times}
                row |= {"floor_forward": floors[0], "floor_both": floors[1]}
                if name == "nha":
                    row["dispatch"] = explain_dispatch(*leaves, window=WINDOW)
                rows.append(row)
                if name == "nha":
                    ours = row
                forward, both = ("forward_graph", "both_graph") if "both_graph" in row else ("forward_eager", "both_eager")
                print(
                    f"{row['heads']:>6} T {tokens:>6} {name:<12} forward {row[forward]:8.3f} (eager {row['forward_eager']:8.3f})"
                    f"  both {row[both]:8.3f} (eager {row['both_eager']:8.3f})  {row['peak_gb']:6.2f} GB"
                    f"  x ours {row[forward] / ours[forward]:6.2f} {row[both] / ours[both]:6.2f}"
                    f"  x floor {row[forward] / floors[0]:6.1f} {row[both] / floors[1]:6.1f}",
                    flush=True,
                )
            torch.cuda.empty_cache()
    arguments.output.mkdir(parents=True, exist_ok=True)
    summary = {
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
    name = device.lower().replace(" ", "_")
    (arguments.output / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(rows, arguments.output / f"{name}.png", f"{device}, bf16, D 128, M 64, W 64, B 1")


if __name__ == "__main__":
    main()
