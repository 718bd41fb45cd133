"""Checks the forward for Hopper GPUs against float64, then times it beside the general kernels in the same run.

    PYTHONPATH=kernels python kernels/benchmarks/bench_hopper.py [--lengths 2048,8192] [--check-only] [--output results/NAME.json]

Outputs start as NaN and every case runs twice for the same bits. Milliseconds under CUDA graphs; kernels by the profiler.
"""

import argparse
import contextlib
import json
import pathlib
import sys
from typing import Any
from unittest import mock

import torch
import triton
from bench import graphed, measure_rates, median_ms
from compare import make_gates, relative_error
from torch import Tensor

from nha_kernels import nha_attention
from nha_kernels.triton.attention import fused
from nha_kernels.triton.attention.rope_table import rope_table
from nha_kernels.triton.hopper.forward import Starts, empty_starts, hopper_forward

WINDOW, SLOTS, DIM = 64, 64, 128
OFFSETS = 320  # of the table of angles that the backward of training reads


def make_inputs(batch: int, tokens: int, kv_heads: int, group: int, gates: str, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(heads: int) -> Tensor:
        return torch.randn(batch, tokens, heads, DIM, generator=generator, device="cuda").bfloat16()

    g = make_gates(gates, (batch, tokens, kv_heads, SLOTS), generator)
    return [normal(kv_heads * group), normal(kv_heads), normal(kv_heads), g]


def frequencies() -> Tensor:
    return 10000.0 ** (-torch.arange(0, DIM, 2, device="cuda").double() / DIM)


def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, rope: Tensor, starts: Starts | None, empty_slots: str = "attend", factor: float = 1.0):  # type: ignore[no-untyped-def]
    angles = rope_table(rope, factor, OFFSETS, k)
    return hopper_forward(q, k, v, g, rope, angles, DIM**-0.5, empty_slots, starts)


def check(batch: int, tokens: int, kv_heads: int, group: int, gates: str, empty_slots: str) -> bool:
    inputs = make_inputs(batch, tokens, kv_heads, group, gates, seed=tokens)
    rope, factor = frequencies(), 1.2
    options = {"window": WINDOW, "rope_attention_factor": factor, "empty_slots": empty_slots, "return_memory": True}
    starts = empty_starts(*inputs[1:], 2)
    out, lse, final = ours(*inputs, rope, starts, empty_slots, factor)
    again = ours(*inputs, rope, starts, empty_slots, factor)
    same = all(torch.equal(x, y) for x, y in zip((out, lse, final), again, strict=True))
    exact, memory = nha_attention(*(x.double() for x in inputs), rope=rope, **options, backend="torch")
    errors = {
        "out": relative_error(out, exact),
        "keys": relative_error(final[..., :DIM], memory.slot_keys),
        "values": relative_error(final[..., DIM:-1], memory.slot_values),
        "log": relative_error(final[..., -1], memory.slot_log_decay),
    }
    segment = 2 * 64
    worst = 0.0
    for s in range(1, starts.slots.shape[1]):  # slots before a segment: those after its tokens before
        part = [x[:, : s * segment].double() for x in inputs]
        _, before = nha_attention(*part, rope=rope, **options, backend="torch")
        at = starts.slots.view(batch, kv_heads, -1, SLOTS, 2 * DIM)[:, :, s]
        logs = starts.log_decay.view(batch, kv_heads, -1, SLOTS)[:, :, s]
        worst = max(worst, relative_error(at[..., :DIM], before.slot_keys), relative_error(at[..., DIM:], before.slot_values))
        worst = max(worst, relative_error(logs, before.slot_log_decay))
    errors["starts"] = worst
    good = same and all(error <= 5e-3 for error in errors.values())
    described = " ".join(f"{name}={error:.1e}" for name, error in errors.items())
    print(
        f"{'ok  ' if good else 'FAIL'} B {batch} T {tokens} {kv_heads * group}/{kv_heads} {gates} {empty_slots}: {described}"
        + "" * same
        + " not the same bits" * (not same),
        flush=True,
    )
    return good


def kernel_times(function: Any, calls: int = 20) -> dict[str, float]:
    """Milliseconds of a call by kernel."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_time_total > 0 and not event.key.startswith("void at::")]
    return {event.key: round(event.device_time_total / calls / 1e3, 4) for event in events}


def peak_gb(function: Any) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,8192,32768,131072")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    cases = [(1, 320, 2, 4, gates, "attend") for gates in ("usual", "slow", "extreme", "mixed")]
    cases += [
        (1, 333, 2, 4, "mixed", "mask"),
        (2, 201, 3, 4, "usual", "attend"),
        (1, 63, 1, 8, "usual", "attend"),
        (1, 1, 1, 4, "usual", "mask"),
    ]
    cases += [(2, 1000, 8, 4, "usual", "attend"), (3, 129, 2, 12, "slow", "mask"), (1, 33000, 1, 4, "mixed", "attend")]
    good = [check(*case) for case in cases]
    if not all(good):
        sys.exit("the forward fails its check, so it is not timed")
    if arguments.check_only:
        return
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    rates = measure_rates()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: {rates.copy / 1e12:.2f} TB/s")
    rows = []
    for tokens in map(int, arguments.lengths.split(",")):
        inputs = make_inputs(1, tokens, 8, 4, "usual")
        leaves, rope = [x.clone().requires_grad_() for x in inputs], frequencies()
        gradient = torch.randn_like(inputs[0])

        def forward() -> Tensor:
            return nha_attention(*inputs, window=WINDOW, rope=rope, backend="triton")  # noqa: B023

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(nha_attention(*leaves, window=WINDOW, rope=rope, backend="triton"), leaves, gradient)  # noqa: B023

        for name in ("general", "hopper"):
            refused = mock.patch.object(fused, "refusal_of_hopper", return_value="the general kernels are timed")
            with refused if name == "general" else contextlib.nullcontext():
                row = {"name": name, "tokens": tokens, "forward_eager": median_ms(forward), "both_eager": median_ms(both)}
                if tokens <= 32768:
                    row |= {"forward_graph": median_ms(graphed(forward)), "both_graph": median_ms(graphed(both))}
                row |= {"forward_gb": peak_gb(forward), "both_gb": peak_gb(both)}
                row["kernels"] = kernel_times(both)
            rows.append(row)
            print(" ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{value}" for key, value in row.items()), flush=True)
    if arguments.output:
        summary = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "rows": rows}
        arguments.output.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
