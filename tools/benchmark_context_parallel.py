#!/usr/bin/env python3
"""Times one attention layer over context ranks against the same shard on one rank (weak scaling):

    torchrun --nproc-per-node=2 tools/benchmark_context_parallel.py --tokens-per-rank 16384 65536 --window 64 [--output FILE.json]

Every rank holds a shard of the given length. Times are forward and backward, medians of the slowest rank, the host ahead of the device.
Those of a row are taken in turns, a few calls each: a GPU slows down as it grows warm, and what comes first would be the fastest.

    one_rank_ms           the operator on the shard alone
    all_ranks_ms          the layer over all ranks; what it takes more is not hidden by compute
    without_sending_ms    the same with every message replaced by a local copy: the difference is what the network costs
    projected_*_ms        the same two with the projections before and after the operator, weights' gradients included

Nothing is timed before the layer over all ranks has given one rank's outputs and gradients (`--dtype float32 --check-only`: only that).
Of a `full` layer, whose work grows with the whole sequence, `one_rank_ms` is one rank's even part: the whole sequence over the ranks.
`kernels` lists what a rank runs in one forward and backward at the first length.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from nha_kernels import AttentionOptions, hybrid_attention
from nha_megatron.checkpoint.files import write_atomically
from nha_megatron.cluster.versions import measurement_facts
from nha_megatron.config import ConfigError, ModelConfig, parse_windows
from nha_megatron.engine.device import backend_for, choose_device
from nha_megatron.layers.kind import RankShape
from nha_megatron.layers.nha.context_parallel.cost import context_parallel_bytes
from nha_megatron.layers.nha.context_parallel.exchange import context_parallel_attention
from nha_megatron.layers.nha.full.cost import choose_exchange, exchange_bytes
from nha_megatron.layers.nha.full.over_ranks import full_attention_over_ranks

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
CALLS_IN_TURN = 5  # the host queues them while the device sleeps


@dataclass(frozen=True)
class Layer:
    """Shape of the attention layer on a rank, and how it is computed over the ranks."""

    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    window: int | None
    hidden_size: int
    exchange: str
    dtype: torch.dtype
    gates: str

    def options(self, device: torch.device) -> AttentionOptions:
        pairs = torch.arange(self.head_dim // 2, dtype=torch.float64, device=device)
        return AttentionOptions(self.window, 500000.0 ** -(pairs * 2 / self.head_dim))

    def draw(self, tokens: int, device: torch.device, seed: int) -> tuple[Tensors, Tensor]:
        """q, k, v, g and the gradient of the output, for `tokens` tokens."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(heads: int, channels: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(1, tokens, heads, channels, generator=generator, device=device).to(dtype)

        q, k, v = (normal(heads, self.head_dim, self.dtype) for heads in (self.heads, self.kv_heads, self.kv_heads))
        z = normal(self.kv_heads, self.slots, torch.float32)
        # Usual gates forget within some hundred tokens, slow ones nothing in a million: then all of a shard matters to the next.
        g = F.logsigmoid(4 * z) / 8 if self.gates == "usual" else -1e-7 * z.abs()
        return (q, k, v, g), normal(self.heads, self.head_dim, self.dtype)

    def on_one_rank(self, tensors: Tensors) -> Tensor:
        return hybrid_attention(*tensors, self.options(tensors[0].device))

    def over_ranks(self, tensors: Tensors, group: dist.ProcessGroup) -> Tensor:
        options = self.options(tensors[0].device)
        if self.window is None:
            return full_attention_over_ranks(*tensors, options, group=group, exchange=self.exchange)  # type: ignore[arg-type]
        return context_parallel_attention(*tensors, options, group=group)

    def draw_weights(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of queries with keys and values, of gates, and of the output."""
        generator = torch.Generator(device).manual_seed(0)
        heads, hidden = self.heads + 2 * self.kv_heads, self.hidden_size
        shapes = ((heads * self.head_dim, hidden), (self.kv_heads * self.slots, hidden), (hidden, self.heads * self.head_dim))
        weights = (torch.randn(*shape, generator=generator, device=device) * shape[1] ** -0.5 for shape in shapes)
        qkv, gate, out = (weight.to(self.dtype).requires_grad_() for weight in weights)
        return qkv, gate, out

    def project(self, hidden: Tensor, weights: tuple[Tensor, Tensor, Tensor], attend: Callable[[Tensors], Tensor]) -> Tensor:
        """hidden [1, T, hidden_size] -> the same, as `nha_megatron/layers/nha/layer.py`: keys and values are parts of one projection."""
        qkv = F.linear(hidden, weights[0]).unflatten(-1, (self.kv_heads, -1, self.head_dim))
        q, k, v = qkv.split([self.heads // self.kv_heads, 1, 1], dim=-2)
        z = F.linear(hidden, weights[1]).float().unflatten(-1, (self.kv_heads, self.slots))
        g = F.logsigmoid(4 * z) / 8 if self.gates == "usual" else -1e-7 * z.abs()
        return F.linear(attend((q.flatten(2, 3), k.squeeze(-2), v.squeeze(-2), g)).flatten(2), weights[2])

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
        rank = RankShape(sequence_length=ranks * tokens, context=ranks, element_bytes=self.dtype.itemsize)
        if self.window is None:
            return exchange_bytes(model, self.exchange, rank)  # type: ignore[arg-type]
        return context_parallel_bytes(model, self.slots, self.window, rank)


def check(layer: Layer, tokens: int, device: torch.device, group: dist.ProcessGroup) -> float:
    """Largest relative difference of this rank's output and gradients from those of one rank that holds all tokens."""
    whole, d_out = layer.draw(tokens * group.size(), device, seed=0)
    mine = slice(group.rank() * tokens, (group.rank() + 1) * tokens)
    whole = _leaves(whole)
    wanted = layer.on_one_rank(whole)
    wanted_gradients = torch.autograd.grad(wanted, whole, d_out)
    shard = _leaves(tuple(x[:, mine] for x in whole))
    # Keys and values lie beside each other, as parts of one projection do.
    k, v = torch.cat(shard[1:3], dim=-1).split([layer.head_dim] * 2, dim=-1)
    given = layer.over_ranks((shard[0], k, v, shard[3]), group)
    gradients = torch.autograd.grad(given, shard, d_out[:, mine])
    pairs = zip((given, *gradients), (wanted, *wanted_gradients), strict=True)
    return max(_difference(mine_given, of_all[:, mine]) for mine_given, of_all in pairs)


def measure(layer: Layer, tokens: int, repeats: int, device: torch.device, group: dist.ProcessGroup) -> dict[str, Any]:
    """One row of the table: times in milliseconds, peak memory in bytes, of the slowest or fullest rank."""
    ranks = group.size()
    tensors, d_out = layer.draw(tokens * ranks if layer.window is None else tokens, device, seed=group.rank())
    whole = _leaves(tensors)
    shard, d_shard = _leaves(tuple(x[:, :tokens] for x in tensors)), d_out[:, :tokens]

    def alone() -> Any:
        return torch.autograd.grad(layer.on_one_rank(whole), whole, d_out)

    def over_ranks() -> Any:
        return torch.autograd.grad(layer.over_ranks(shard, group), shard, d_shard)

    def without_sending() -> Any:
        with nothing_sent():
            return over_ranks()

    functions = {"one_rank": alone, "all_ranks": over_ranks}
    if layer.window is not None:
        functions["without_sending"] = without_sending
    row: dict[str, Any] = {"tokens_per_rank": tokens}
    for name, (on_device, on_host) in zip(functions, _times(functions.values(), repeats, device, group), strict=True):
        row |= {f"{name}_ms": _slowest(on_device, device), f"{name}_host_ms": _slowest(on_host, device)}
    for name, function in (("one_rank", alone), ("all_ranks", over_ranks)):
        row[f"{name}_peak_bytes"] = int(_slowest(_peak_bytes(function, device), device))
    if layer.window is None:
        row["one_rank_ms"] /= ranks
    else:
        row["sending_ms"] = row["all_ranks_ms"] - row["without_sending_ms"]
    if layer.window is not None and layer.hidden_size:
        row |= _measure_projected(layer, tokens, repeats, device, group)
    for name in ("one_rank", "all_ranks"):
        row[f"{name}_tokens_per_second_per_rank"] = 1e3 * tokens / row[f"{name}_ms"]
    return row | {
        "not_hidden_ms": row["all_ranks_ms"] - row["one_rank_ms"],
        "efficiency": row["one_rank_ms"] / row["all_ranks_ms"],
        "bytes_sent": layer.bytes_sent(tokens, ranks),
    }


def _measure_projected(layer: Layer, tokens: int, repeats: int, device: torch.device, group: dist.ProcessGroup) -> dict[str, float]:
    weights = layer.draw_weights(device)
    hidden = torch.randn(1, tokens, layer.hidden_size, device=device).to(layer.dtype).requires_grad_()
    d_out = torch.randn_like(hidden)

    def project(attend: Callable[[Tensors], Tensor]) -> Any:
        return torch.autograd.grad(layer.project(hidden, weights, attend), (hidden, *weights), d_out)

    functions = (lambda: project(layer.on_one_rank), lambda: project(lambda tensors: layer.over_ranks(tensors, group)))
    one, all_ = (_slowest(on_device, device) for on_device, _ in _times(functions, repeats, device, group))
    return {"projected_one_rank_ms": one, "projected_all_ranks_ms": all_, "projected_efficiency": one / all_}


def list_kernels(layer: Layer, tokens: int, count: int, device: torch.device, group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """The `count` kernels (operations on the CPU) of this rank that take longest in one forward and backward."""
    tensors, d_out = layer.draw(tokens, device, seed=group.rank())
    shard = _leaves(tensors)
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    for _ in range(2):
        torch.autograd.grad(layer.over_ranks(shard, group), shard, d_out)
    _synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        dist.barrier(group)  # or a rank waits in its first collective for another's profiler; its own all-reduce is listed too
        _synchronize(device)
        torch.autograd.grad(layer.over_ranks(shard, group), shard, d_out)
        _synchronize(device)
    kernels = [
        {"name": event.key[:100], "calls": event.count, "ms": 1e-3 * (event.self_device_time_total if cuda else event.self_cpu_time_total)}
        for event in profile.key_averages()
    ]
    return sorted(kernels, key=lambda kernel: -kernel["ms"])[:count]


@contextmanager
def nothing_sent() -> Iterator[None]:
    """Inside, collectives give every rank its own message as that of every other: the same local work, no network."""

    class Arrived:
        def wait(self) -> None:
            return None

    def gather(output: Tensor, own: Tensor, group: dist.ProcessGroup, **_: Any) -> Arrived:
        output.view(group.size(), -1).copy_(own.view(1, -1).expand(group.size(), -1))
        return Arrived()

    def exchange(output: Tensor, *_: Any, **__: Any) -> Arrived:
        output.zero_()
        return Arrived()

    before = dist.all_gather_into_tensor, dist.all_to_all_single
    dist.all_gather_into_tensor, dist.all_to_all_single = gather, exchange
    try:
        yield
    finally:
        dist.all_gather_into_tensor, dist.all_to_all_single = before


def _leaves(tensors: Tensors) -> Tensors:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


def _difference(given: Tensor, wanted: Tensor) -> float:
    difference, norm = (given.double() - wanted.double()).norm(), wanted.double().norm()
    return float((difference / norm if norm > 0 else difference).detach())


def _times(
    functions: Collection[Callable[[], Any]], repeats: int, device: torch.device, group: dist.ProcessGroup
) -> list[tuple[float, float]]:
    """Milliseconds of a call of each function on the device, and those that the host needs to start it: medians, taken in turns."""
    times: list[list[tuple[float, float]]] = [[] for _ in functions]
    for function in (*functions,) * 3:
        function()
    while len(times[-1]) < repeats:
        calls = min(CALLS_IN_TURN, repeats - len(times[-1]))
        for function, of_function in zip(functions, times, strict=True):
            dist.barrier(group)
            of_function += _turn(function, calls, device)
    return [(statistics.median(on_device), statistics.median(on_host)) for on_device, on_host in (zip(*x, strict=True) for x in times)]


def _turn(function: Callable[[], Any], calls: int, device: torch.device) -> list[tuple[float, float]]:
    _synchronize(device)
    cuda, host, events = device.type == "cuda", [], []
    if cuda:
        torch.cuda._sleep(100_000_000)  # some 50 ms, in which the host gets ahead
    for call in range(calls + 1):
        if call > 0:
            function()
        host.append(time.perf_counter())
        if cuda:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
    _synchronize(device)
    on_host = [1e3 * (b - a) for a, b in itertools.pairwise(host)]
    on_device = [a.elapsed_time(b) for a, b in itertools.pairwise(events)] if cuda else on_host
    return list(zip(on_device, on_host, strict=True))


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
    parser.add_argument("--hidden-size", type=int, default=4096, help="of the projections; 0 leaves them out")
    parser.add_argument("--gates", choices=["usual", "slow"], default="usual", help="slow: nothing is ever forgotten, the worst case")
    parser.add_argument("--repeats", type=int, default=15, help="calls that are timed")
    parser.add_argument("--check-tokens", type=int, default=1024, help="tokens of a shard in the check before the first timing")
    parser.add_argument("--check-only", action="store_true", help="time nothing")
    parser.add_argument("--kernels", type=int, default=25, help="how many kernels to list")
    parser.add_argument("--commit", help="of the code, to be noted where there is no git checkout")
    parser.add_argument("--output", type=Path, metavar="JSON", help="written anew after every row")
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
        return benchmark(arguments, window, device, [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])
    finally:
        if joined_here:
            dist.destroy_process_group()


def benchmark(arguments: argparse.Namespace, window: int | None, device: torch.device, command: Sequence[str]) -> int:
    group = dist.group.WORLD
    assert group is not None
    layer = Layer(
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        slots=arguments.slots,
        window=window,
        hidden_size=arguments.hidden_size,
        exchange=choose_exchange(arguments.cp_comm_type, arguments.heads, group.size())[0],
        dtype=getattr(torch, arguments.dtype),
        gates=arguments.gates,
    )
    # Sums of some thousand terms in another order, with roundings of 6e-8; or roundings of 2e-3 (rms) at most four times on the way of a
    # gradient.
    allowed = 5e-6 if layer.dtype == torch.float32 else 8e-3
    difference = _slowest(check(layer, arguments.check_tokens, device, group), device)
    if not difference <= allowed:
        print(f"error: the layer over {group.size()} ranks differs from one rank by {difference:.1e}, allowed {allowed}", file=sys.stderr)
        return 1
    if group.rank() == 0:
        print(f"over {group.size()} ranks as on one in {layer.dtype}: {difference:.1e}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "ranks": group.size(),
        "environment": measurement_facts(device, command, arguments.commit),
        "layer": {name: str(value) if isinstance(value, torch.dtype) else value for name, value in vars(layer).items()},
        "difference_from_one_rank": difference,
        "rows": [],
        "kernels": [],
    }

    def write() -> None:
        if group.rank() == 0 and arguments.output is not None:
            write_atomically(arguments.output, json.dumps(result, indent=2) + "\n")

    write()
    if not arguments.check_only:
        for tokens in arguments.tokens_per_rank:
            result["rows"].append(measure(layer, tokens, arguments.repeats, device, group))
            write()
            if group.rank() == 0:
                print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
        result["kernels"] = list_kernels(layer, arguments.tokens_per_rank[0], arguments.kernels, device, group)
        write()
    if group.rank() == 0:
        print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
