#!/usr/bin/env python3
"""Times one attention layer over context ranks against the same shard on one rank (weak scaling):

    torchrun --nproc-per-node=2 tools/benchmark_context_parallel.py --tokens-per-rank 16384 65536 --window 64 [--output FILE.json]

Every rank holds a shard of the given length. `one_rank_ms` is the operator on the shard alone, `all_ranks_ms` the layer over all ranks,
`exchange_ms` its exchange without the operator, each forward and backward, medians of the slowest rank; the time not hidden by compute is
`all_ranks_ms - one_rank_ms`. Nothing is timed before the layer over all ranks has given one rank's outputs and gradients.
Of a `full` layer, whose work grows with the whole sequence, `one_rank_ms` is one rank's even part: the whole sequence over the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from nha_kernels import nha_attention
from nha_megatron.attention.context_parallel_exchange import context_parallel_attention, fetch_memory
from nha_megatron.attention.context_parallel_plan import plan_context_parallel
from nha_megatron.attention.full_attention_context_parallel import full_attention_over_ranks
from nha_megatron.config import ConfigError, ModelConfig, parse_windows
from nha_megatron.config.arithmetic import context_parallel_bytes
from nha_megatron.config.full_layers import choose_exchange, exchange_bytes
from nha_megatron.engine.device import backend_for, choose_device

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Layer:
    """Shape of the attention layer on a rank, and how it is computed over the ranks."""

    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    window: int | None
    exchange: str
    dtype: torch.dtype

    def options(self, device: torch.device) -> dict[str, Any]:
        pairs = torch.arange(self.head_dim // 2, dtype=torch.float64, device=device)
        return {"rope": 500000.0 ** -(pairs * 2 / self.head_dim)}

    def draw(self, tokens: int, device: torch.device, seed: int) -> tuple[Tensors, Tensor]:
        """q, k, v, g and the gradient of the output, for `tokens` tokens."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(heads: int, channels: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(1, tokens, heads, channels, generator=generator, device=device).to(dtype)

        q, k, v = (normal(heads, self.head_dim, self.dtype) for heads in (self.heads, self.kv_heads, self.kv_heads))
        g = F.logsigmoid(4 * normal(self.kv_heads, self.slots, torch.float32)) / 8
        return (q, k, v, g), normal(self.heads, self.head_dim, self.dtype)

    def on_one_rank(self, tensors: Tensors) -> Tensor:
        return nha_attention(*tensors, window=self.window, **self.options(tensors[0].device))

    def over_ranks(self, tensors: Tensors, group: dist.ProcessGroup) -> Tensor:
        options = self.options(tensors[0].device)
        if self.window is None:
            return full_attention_over_ranks(*tensors, group=group, exchange=self.exchange, **options)  # type: ignore[arg-type]
        return context_parallel_attention(*tensors, window=self.window, group=group, **options)

    def exchange_alone(self, tensors: Tensors, group: dist.ProcessGroup) -> list[Tensor]:
        """The memory before the shard: what a rank needs of the others, and what its backward sends back."""
        q, k, v, g = tensors
        assert self.window is not None
        plan = plan_context_parallel(tokens_per_rank=k.shape[1], num_ranks=group.size(), rank=group.rank(), window=self.window)
        q, memory = fetch_memory(q, k, v, g, plan=plan, group=group)
        return [q, memory.slot_keys, memory.slot_values, memory.slot_log_decay, memory.window_keys, memory.window_values]

    def bytes_sent(self, tokens: int, ranks: int) -> int:
        """Bytes that an inner rank hands out in the forward."""
        model = ModelConfig(
            num_layers=1,
            hidden_size=self.heads * self.head_dim,
            ffn_hidden_size=1,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_slots=self.slots,
            vocab_size=1,
        )
        size = self.dtype.itemsize
        if self.window is None:
            return exchange_bytes(model, self.exchange, tokens, ranks, element_bytes=size)  # type: ignore[arg-type]
        return context_parallel_bytes(model, self.window, tokens, ranks, element_bytes=size)


def check(layer: Layer, tokens: int, device: torch.device, group: dist.ProcessGroup) -> float:
    """Largest relative difference of this rank's output and gradients from those of one rank that holds all tokens."""
    whole, d_out = layer.draw(tokens * group.size(), device, seed=0)
    mine = slice(group.rank() * tokens, (group.rank() + 1) * tokens)
    whole = _leaves(whole)
    wanted = layer.on_one_rank(whole)
    wanted_gradients = torch.autograd.grad(wanted, whole, d_out)
    shard = _leaves(tuple(x[:, mine] for x in whole))
    given = layer.over_ranks(shard, group)
    gradients = torch.autograd.grad(given, shard, d_out[:, mine])
    pairs = zip((given, *gradients), (wanted, *wanted_gradients), strict=True)
    return max(_difference(mine_given, of_all[:, mine]) for mine_given, of_all in pairs)


def measure(layer: Layer, tokens: int, repeats: int, device: torch.device, group: dist.ProcessGroup) -> dict[str, Any]:
    """One row of the table: times in milliseconds, peak memory in bytes, of the slowest or fullest rank."""
    ranks = group.size()
    alone_tokens = tokens * ranks if layer.window is None else tokens
    tensors, d_out = layer.draw(alone_tokens, device, seed=group.rank())
    whole = _leaves(tensors)
    shard, d_shard = _leaves(tuple(x[:, :tokens] for x in tensors)), d_out[:, :tokens]

    def run(function: Callable[[], Any]) -> tuple[float, float]:
        return _slowest(_median_ms(function, repeats, device, group), device), _slowest(_peak_bytes(function, device), device)

    one_ms, one_peak = run(lambda: torch.autograd.grad(layer.on_one_rank(whole), whole, d_out))
    all_ms, all_peak = run(lambda: torch.autograd.grad(layer.over_ranks(shard, group), shard, d_shard))
    if layer.window is None:
        one_ms /= ranks
    row = {
        "tokens_per_rank": tokens,
        "one_rank_ms": one_ms,
        "all_ranks_ms": all_ms,
        "not_hidden_ms": all_ms - one_ms,
        "efficiency": one_ms / all_ms,
        "bytes_sent": layer.bytes_sent(tokens, ranks),
        "one_rank_peak_bytes": int(one_peak),
        "all_ranks_peak_bytes": int(all_peak),
    }
    if layer.window is not None:
        row["exchange_ms"] = run(lambda: _backward_of_sum(layer.exchange_alone(shard, group), shard))[0]
    return row


def _backward_of_sum(outputs: Sequence[Tensor], inputs: Tensors) -> Any:
    used = [x for x in outputs if x.requires_grad]
    return torch.autograd.grad(used, inputs, [torch.ones_like(x) for x in used], allow_unused=True)


def _leaves(tensors: Tensors) -> Tensors:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


def _difference(given: Tensor, wanted: Tensor) -> float:
    difference, norm = (given.double() - wanted.double()).norm(), wanted.double().norm()
    return float(difference / norm if norm > 0 else difference)


def _median_ms(function: Callable[[], Any], repeats: int, device: torch.device, group: dist.ProcessGroup) -> float:
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        dist.barrier(group)
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _peak_bytes(function: Callable[[], Any], device: torch.device) -> float:
    """Memory taken beyond what is held before; 0 on the CPU, where it is not counted."""
    if device.type != "cuda":
        function()
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return float(torch.cuda.max_memory_allocated(device) - before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(value: float, device: torch.device) -> float:
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time one attention layer over context ranks; start it with torchrun.")
    parser.add_argument("--tokens-per-rank", type=int, nargs="+", default=[16384, 65536], metavar="L")
    parser.add_argument("--window", default="64", help="tokens, 0 or `full`")
    parser.add_argument("--cp-comm-type", choices=["auto", "a2a", "all_gather"], default="auto", help="of a full layer")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--check-tokens", type=int, default=1024, help="tokens of a shard in the check before the first timing")
    parser.add_argument("--output", type=Path, metavar="JSON")
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node=2 tools/benchmark_context_parallel.py")
    try:
        device = choose_device("auto")
        (window,) = parse_windows(arguments.window, 1)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    joined_here = not dist.is_initialized()
    if joined_here:
        dist.init_process_group(backend_for(device), device_id=device if device.type == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        return benchmark(arguments, window, device)
    finally:
        if joined_here:
            dist.destroy_process_group()


def benchmark(arguments: argparse.Namespace, window: int | None, device: torch.device) -> int:
    group = dist.group.WORLD
    assert group is not None
    layer = Layer(
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        slots=arguments.slots,
        window=window,
        exchange=choose_exchange(arguments.cp_comm_type, arguments.heads, group.size())[0],
        dtype=getattr(torch, arguments.dtype),
    )
    # As in the tests: roundings of 6e-8, or of 2e-3 (rms) at most four times on the way of a gradient.
    allowed = 2e-6 if layer.dtype == torch.float32 else 8e-3
    difference = _slowest(check(layer, arguments.check_tokens, device, group), device)
    if not difference <= allowed:
        print(f"error: the layer over {group.size()} ranks differs from one rank by {difference:.1e}, allowed {allowed}", file=sys.stderr)
        return 1
    rows = [measure(layer, tokens, arguments.repeats, device, group) for tokens in arguments.tokens_per_rank]
    result = {
        "ranks": group.size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "layer": {name: str(value) if isinstance(value, torch.dtype) else value for name, value in vars(layer).items()},
        "difference_from_one_rank": difference,
        "rows": rows,
    }
    if group.rank() == 0:
        text = json.dumps(result, indent=2)
        print(text)
        if arguments.output is not None:
            arguments.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
