"""Checks, then times on this GPU what context parallelism does with a shard: `summarise_slots`, then `add_summary_gradients` to gradients
that are there. Milliseconds forward and forward with backward, beside plain PyTorch.

    PYTHONPATH=kernels python kernels/benchmarks/bench_summary.py [--lengths 8192,65536,131072]

With gates that forget, only the last tokens are read beside the log-gates; with slow gates, which never do, everything is: the worst case.
The floor is that of the worst case, bytes / copy rate with the rate measured here: k, v, g once forward; k, v, g once and dk, dv, dg read
and written once backward.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench import graphed, measure_rates, median_ms
from check import check
from check_summary import SummaryCase
from compare import require_cuda_device
from torch import Tensor
from torch.nn.functional import logsigmoid

from nha_kernels.slot_summary import add_summary_gradients, summarise_slots, summary_in_pytorch

SLOTS, DIM, KV_HEADS = 64, 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="8192,65536,131072")
    arguments = parser.parse_args()
    require_cuda_device()
    verdict = check(SummaryCase(tokens=20001, kv_heads=KV_HEADS))
    if not verdict["passed"] or "refused" in verdict:
        sys.exit(f"the kernels fail their check, so they are not timed: {verdict}")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    copy = measure_rates().copy
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {1e-12 * copy:.2f} TB/s", flush=True)
    for tokens in map(int, arguments.lengths.split(",")):
        k, v = (torch.randn(1, tokens, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        z = torch.randn(1, tokens, KV_HEADS, SLOTS, device="cuda")
        read = tokens * KV_HEADS * (2 * DIM * 2 + SLOTS * 4)
        floors = [1e3 * read / copy, 4e3 * read / copy]
        for name, function, g in (
            ("kernels", summary_by_kernels, logsigmoid(z) / 8),
            ("kernels with slow gates", summary_by_kernels, -1e-7 * z.abs()),
            ("pytorch", summary_by_pytorch, logsigmoid(z) / 8),
        ):
            times = [median_ms(graphed(call)) for call in function(k, v, g)]
            print(
                f"T {tokens:>6} {name}: forward {times[0]:.3f} ms ({times[0] / floors[0]:.1f} x floor),"
                f" forward + backward {times[1]:.3f} ms ({times[1] / floors[1]:.1f} x floor)",
                flush=True,
            )


def summary_by_kernels(k: Tensor, v: Tensor, g: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Calls of the forward, and of forward and backward."""
    summary = torch.empty(1, KV_HEADS, SLOTS, 2 * DIM + 1, device="cuda")
    d_summary = torch.randn_like(summary)
    d_summary[..., -1] = 0  # as for a log-decay of which nothing is left
    gradients = [torch.zeros_like(x) for x in (k, v, g)]

    def forward() -> Any:
        return summarise_slots(k, v, g, summary)

    return forward, lambda: add_summary_gradients(k, v, g, forward(), d_summary, *gradients)


def summary_by_pytorch(k: Tensor, v: Tensor, g: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    leaves = [x.clone().requires_grad_() for x in (k, v, g)]
    gradients = [torch.randn_like(x) for x in summary_in_pytorch(*leaves)]
    return lambda: summary_in_pytorch(k, v, g), lambda: torch.autograd.grad(summary_in_pytorch(*leaves), leaves, gradients)


if __name__ == "__main__":
    main()
