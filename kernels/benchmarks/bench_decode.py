"""Checks, then times one decode step on this GPU, in a CUDA graph: a table and a JSON file.

    PYTHONPATH=kernels python kernels/benchmarks/bench_decode.py [--output kernels/benchmarks/results] [--batches 1,64]

A measurement is a graph of several steps, each of another memory, which together exceed the L2 cache: a real step finds its layer's memory
in device memory, because all other layers ran since. The floor is bytes / copy rate, with the copy rate measured here and
bytes = slots read and written, window keys and values read, one window row written, q, k, v, g and out once.
`--registers` and `--slots` compare limits of registers a thread (0: none) and slots a program instead of what the architecture chooses.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from bench import graphed, measure_rates, median_ms
from check import check
from check_decode import DecodeCase
from compare import require_cuda_device
from torch import Tensor

from nha_kernels import DecodeMemory, Memory, decode_memory, nha_attention, nha_decode_step
from nha_kernels.triton.architectures import architecture_of
from nha_kernels.triton.architectures.tiles import DecodeTiles
from nha_kernels.triton.dispatch import attends_by_library

SLOTS, DIM, QUERY_HEADS, KV_HEADS = 64, 128, 32, 8
L2_BYTES = 64 * 2**20


def step_bytes(batch: int, tokens: int, window: int) -> int:
    slots = 2 * KV_HEADS * SLOTS * 2 * DIM * 4
    new = tokens * (2 * QUERY_HEADS * DIM * 2 + KV_HEADS * (2 * DIM * 2 + SLOTS * 4))
    leaving_and_kept = tokens * KV_HEADS * (2 * DIM * 2 + 2 * SLOTS * 4)
    return batch * (slots + KV_HEADS * window * 2 * DIM * 2 + new + leaving_and_kept)


def full_memory(batch: int, window: int) -> DecodeMemory:
    """Every place of slots and window holds something."""
    memory = decode_memory(Memory.empty(batch, KV_HEADS, SLOTS, DIM, DIM, window, dtype=torch.bfloat16, device="cuda"))
    memory.length.fill_(100_000)
    for x in (memory.slot_keys, memory.slot_values, memory.window_keys, memory.window_values):
        x.normal_()
    for x in (memory.slot_log_decay, memory.window_log_gates):
        x.fill_(-0.1)
    return memory


def contestants(batch: int, tokens: int, window: int) -> tuple[int, dict[str, Callable[[], Any]]]:
    """Number of steps in a call, and the calls."""
    q, k, v = (torch.randn(batch, tokens, heads, DIM, device="cuda", dtype=torch.bfloat16) for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS))
    g = torch.full((batch, tokens, KV_HEADS, SLOTS), -0.1, device="cuda")
    rope = 10000.0 ** (-torch.arange(0, DIM, 2, device="cuda").double() / DIM)
    first = full_memory(batch, window)
    count = min(64, max(2, -(-2 * L2_BYTES // first.num_bytes)))
    memories = [first, *(full_memory(batch, window) for _ in range(count - 1))]

    def fused() -> None:
        for memory in memories:
            nha_decode_step(q, k, v, g, memory, rope=rope, backend="triton")

    if attends_by_library(q, v, window):  # in training those take another path
        return count, {"fused": fused}
    plain = [memory.aligned() for memory in memories[:2]]

    def training_kernels() -> None:
        for i in range(count):
            with torch.no_grad():
                nha_attention(q, k, v, g, window=window, rope=rope, memory=plain[i % 2], return_memory=True)

    return count, {"fused": fused, "training kernels": training_kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--tokens", default="1,4")
    parser.add_argument("--windows", default="64,1024")
    parser.add_argument("--registers", default="chosen")
    parser.add_argument("--slots", default="chosen")
    arguments = parser.parse_args()
    require_cuda_device()
    for tokens in map(int, arguments.tokens.split(",")):
        verdict = check(DecodeCase(steps=(tokens,) * 2, graph=True, kv_heads=KV_HEADS, group=QUERY_HEADS // KV_HEADS, slots=SLOTS))
        if not verdict["passed"] or "refused" in verdict:
            sys.exit(f"the decode kernels fail their check, so they are not timed: {verdict}")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    copy = measure_rates().copy
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, {copy / 1e12:.2f} TB/s")
    rows = []
    for registers, slots in itertools.product(arguments.registers.split(","), arguments.slots.split(",")):
        changes = {} if registers == "chosen" else {"registers": int(registers) or None}
        changes |= {} if slots == "chosen" else {"slots": int(slots)}
        with decode_tiles_with(changes) as decode_tiles:
            for window in map(int, arguments.windows.split(",")):
                for tokens in map(int, arguments.tokens.split(",")):
                    for batch in map(int, arguments.batches.split(",")):
                        rows += time_shape(batch, tokens, window, copy, decode_tiles)
                        torch.cuda.empty_cache()
    arguments.output.mkdir(parents=True, exist_ok=True)
    summary = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "command": "PYTHONPATH=kernels python kernels/benchmarks/bench_decode.py " + " ".join(sys.argv[1:]),
        "copy_tb_per_s": copy / 1e12,
        "shape": {"query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "slots": SLOTS, "key_dim": DIM, "value_dim": DIM, "dtype": "bfloat16"},
        "rows": rows,
    }
    (arguments.output / f"decode_{device.lower().replace(' ', '_')}.json").write_text(json.dumps(summary, indent=1) + "\n")


@contextlib.contextmanager
def decode_tiles_with(changes: dict[str, int | None]) -> Iterator[Callable[..., DecodeTiles]]:
    """Inside, this GPU's tiles are changed."""
    architecture = architecture_of(torch.cuda.get_device_capability())
    chosen = architecture.decode_tiles

    def changed(q: Tensor, k: Tensor, v: Tensor) -> DecodeTiles:
        return dataclasses.replace(chosen(q, k, v), **changes)

    with mock.patch.object(architecture, "decode_tiles", changed):
        yield changed


def time_shape(batch: int, tokens: int, window: int, copy: float, decode_tiles: Callable[..., DecodeTiles]) -> list[dict[str, Any]]:
    q, k = (torch.empty(batch, tokens, heads, DIM, dtype=torch.bfloat16, device="meta") for heads in (QUERY_HEADS, KV_HEADS))
    tiles = decode_tiles(q, k, k)
    count, calls = contestants(batch, tokens, window)
    floor = 1e3 * step_bytes(batch, tokens, window) / copy
    rows = []
    for name, call in calls.items():
        row = {"name": name, "batch": batch, "tokens": tokens, "window": window}
        row |= {"registers": tiles.registers, "slots": tiles.slots}
        row |= {"ms": median_ms(graphed(call)) / count, "floor_ms": floor}
        rows.append(row)
        print(
            f"W {window:>5} T {tokens} B {batch:>4} {name:<17} {1e3 * row['ms']:8.1f} us a step  floor {1e3 * floor:7.1f} us"
            f"  x floor {row['ms'] / floor:6.1f}  registers {row['registers']} slots {row['slots']}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
