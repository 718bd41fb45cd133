"""Checks, then times `slot_summary` on this GPU against its plain PyTorch form: milliseconds forward and forward with backward.

    PYTHONPATH=kernels python kernels/benchmarks/bench_summary.py [--lengths 8192,65536,131072]

The floor is bytes / copy rate, with the rate measured here: k, v, g once forward; k, v, g, dk, dv, dg once backward.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench import graphed, measure_rates, median_ms
from check import check
from check_summary import SummaryCase
from torch import Tensor
from torch.nn.functional import logsigmoid

from nha_kernels import slot_summary
from nha_kernels.slot_summary import summary_in_pytorch

SLOTS, DIM, KV_HEADS = 64, 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="8192,65536,131072")
    arguments = parser.parse_args()
    verdict = check(SummaryCase(tokens=20001, kv_heads=KV_HEADS))
    if not verdict["passed"] or "refused" in verdict:
        sys.exit(f"the kernels fail their check, so they are not timed: {verdict}")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    copy = measure_rates().copy
    for tokens in map(int, arguments.lengths.split(",")):
        k, v = (torch.randn(1, tokens, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
        g = (logsigmoid(torch.randn(1, tokens, KV_HEADS, SLOTS, device="cuda")) / 8).requires_grad_()
        read = tokens * KV_HEADS * (2 * DIM * 2 + SLOTS * 4)
        for name, function in (("kernels", slot_summary), ("pytorch", summary_in_pytorch)):
            forward, both = calls(function, [k, v, g])
            times = [median_ms(graphed(call)) for call in (forward, both)]
            floors = [1e3 * read / copy, 3e3 * read / copy]
            print(
                f"T {tokens:>6} {name}: forward {times[0]:.3f} ms ({times[0] / floors[0]:.1f} x floor),"
                f" forward + backward {times[1]:.3f} ms ({times[1] / floors[1]:.1f} x floor)",
                flush=True,
            )


def calls(function: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    gradients = [torch.randn_like(x) for x in function(*leaves)]

    def forward() -> Any:
        with torch.no_grad():
            return function(*leaves)

    return forward, lambda: torch.autograd.grad(function(*leaves), leaves, gradients)


if __name__ == "__main__":
    main()
