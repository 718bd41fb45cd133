#!/usr/bin/env python3
"""Times whole training steps of a model at long context, over context ranks and without:

    torchrun --nproc-per-node=2 tools/benchmark_training.py --tokens 32768 131072 524288 --output FILE.json

By default a 1.2B model with grouped query heads of 128 channels (the shape of configs/nha-1.3b.yaml but for its heads) in bf16: forward,
chunked loss, backward, gradient reduction and the distributed optimizer's update of one sequence a model replica, by the Megatron engine.
Context sizes are by default 1 (what is left of the ranks is data parallel) and all ranks. Every length of context size c is timed at
context size 1 with a c-th of the tokens too: as many tokens a rank, so the difference is what context parallelism adds (weak scaling).
Tokens of `full` layers cost more in longer documents: such models are compared so only with `--document-tokens` that divide a shard.

Nothing is timed before all context sizes have given the same loss and gradient norm for the same sequences. Tokens are random: timing
needs no corpus. Recomputation is the least that the memory estimate allows, or the next when memory runs out; what never fits is reported.
The largest context size comes first, so that memory runs out last: when it does so on some ranks only, the others wait for these in a
collective, and nothing more can be timed.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import math
import os

# The lengths of a series differ: blocks cached for one would not fit the next, and memory would run out before it is full.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from nha_megatron.checkpoint.files import write_atomically
from nha_megatron.cluster.versions import measurement_facts
from nha_megatron.config import ConfigError, RunConfig, load_config
from nha_megatron.config.load import with_overrides
from nha_megatron.data import Batch
from nha_megatron.data.batch import make_batch
from nha_megatron.engine.device import choose_device
from nha_megatron.estimate.counts import flops_per_token, num_parameters
from nha_megatron.estimate.memory import estimate_memory
from nha_megatron.estimate.traffic import bytes_sent_per_layer
from nha_megatron.known_warnings import silence_known_warnings
from nha_megatron.training.hardware import device_peak_flops, memory_high_water

if TYPE_CHECKING:
    from nha_megatron.engine.layout import Layout
    from nha_megatron.engine.megatron import MegatronEngine

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = ROOT / "configs" / "nha-1.3b.yaml"
DEFAULT_SHAPE = ("model.num_heads=16", "model.num_kv_heads=4", "model.window=64")
RECOMPUTE = ("none", "full")  # selective recomputation saves little with a fused operator
ESTIMATE_SHARE = 0.75  # of the device's memory: the estimate leaves out workspaces and the allocator's fragmentation
AGREEMENT_S = 20.0  # all ranks run out of memory at about the same time, or some wait for others
LONG_STEP_S = 3.0  # longer steps are timed once: they vary less, and the machine's time is short
HANGING_S = 60.0  # a row takes less; the stack shows where a rank waits

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is timed: one sequence of `tokens` tokens for each model replica, over `context` ranks."""

    context: int
    tokens: int
    recompute: str

    def configure(self, base: RunConfig, world_size: int, sequences: int | None = None) -> RunConfig:
        """`base` with this layout and length. `sequences` of a global batch: by default one for each data-parallel rank."""
        parallel = base.parallel
        rows = world_size // (parallel.tensor * parallel.pipeline * self.context) if sequences is None else sequences
        changes = {
            "parallel.context": self.context,
            "data.sequence_length": self.tokens,
            "training.recompute": self.recompute,
            "training.micro_batch_size": 1,
            "training.global_batch_size": max(1, rows),
            "training.stages": "null",
            "training.engine": "megatron",
            "training.deepspeed": "null",
        }
        return with_overrides(base, [f"{name}={value}" for name, value in changes.items()])


class Bench:
    """One engine at a time, built anew when layout or recomputation change."""

    def __init__(self, base: RunConfig, device: torch.device, document_tokens: int | None) -> None:
        self.base, self.device, self.document_tokens = base, device, document_tokens
        self.world_size = int(os.environ["WORLD_SIZE"])
        self._engine: MegatronEngine | None = None
        self._built: tuple[int, str] | None = None
        self.failures = 0

    def engine(self, setting: Setting, config: RunConfig) -> MegatronEngine:
        # Imported late: Megatron warns on import, and its known warnings are silenced by then.
        from nha_megatron.engine.layout import create_layout
        from nha_megatron.engine.megatron import MegatronEngine

        if self._engine is None or self._built != (setting.context, setting.recompute):
            self.release()
            self._engine = MegatronEngine(config, self.device, create_layout(config, self.device))
            self._built = (setting.context, setting.recompute)
        self._engine.begin_stage(config)
        return self._engine

    def release(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._built = None
        self.forget()

    def forget(self) -> None:
        gc.collect()  # an engine is a cycle of references
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def recover(self) -> None:
        """After memory has run out on this rank. Raises `RanksDisagree` where it has not on all."""
        self.release()
        self.failures += 1
        if not all_ranks_arrive(f"failure {self.failures}", self.world_size, AGREEMENT_S):
            raise RanksDisagree

    def first_step(self, setting: Setting, sequences: int) -> tuple[float, float]:
        """Loss and gradient norm of fresh weights, on `sequences` sequences."""
        self.release()
        config = setting.configure(self.base, self.world_size, sequences)
        engine = self.engine(setting, config)
        result = engine.train_step(self._batches(config, engine.layout), config.optimizer.lr)
        self.release()
        return result.loss, result.grad_norm

    def measure(self, setting: Setting, steps: int) -> Row:
        """One row of the table: of the slowest or the fullest rank."""
        config = setting.configure(self.base, self.world_size)
        engine = self.engine(setting, config)
        batches = self._batches(config, engine.layout)
        self.forget()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        def step() -> float:
            dist.barrier()
            _synchronize(self.device)
            start = time.perf_counter()
            result = engine.train_step(batches, config.optimizer.lr)
            _synchronize(self.device)
            if result.skipped:
                raise ConfigError(f"{setting}: loss {result.loss} or gradient norm {result.grad_norm} is not finite")
            losses.append(result.loss)
            return _largest(time.perf_counter() - start, self.device)

        losses: list[float] = []
        faulthandler.dump_traceback_later(HANGING_S)
        step()  # kernels are compiled and memory is taken
        times = [step()]
        if times[0] < LONG_STEP_S:
            times += [step() for _ in range(steps - 1)]
        faulthandler.cancel_dump_traceback_later()
        seconds = statistics.median(times)
        tokens = config.training.global_batch_size * setting.tokens
        peak = device_peak_flops(self.device)
        flops = tokens * flops_per_token(config.model, min(setting.tokens, self.document_tokens or setting.tokens)) / self.world_size
        return {
            "step_ms": 1e3 * seconds,
            "timed_steps": len(times),
            "tokens_per_second_per_gpu": tokens / seconds / self.world_size,
            "mfu": None if peak is None else flops / seconds / peak,
            "peak_bytes": int(_largest(memory_high_water(self.device), self.device)),
            "losses": losses,
        }

    def _batches(self, config: RunConfig, layout: Layout) -> list[Batch]:
        """This rank's micro batches of one global batch: sequence i is the same in every layout."""
        length = config.data.sequence_length
        batches = []
        for number in range(layout.dp_rank, config.training.global_batch_size, layout.dp_size):
            tokens = np.random.default_rng(number).integers(1, config.model.vocab_size, (1, length + 1))
            if self.document_tokens is not None:
                tokens[:, self.document_tokens - 1 :: self.document_tokens] = 0
            shard = {"cp_rank": layout.cp_rank, "cp_size": layout.cp_size}
            batches.append(make_batch(tokens, 0, isolate_documents=self.document_tokens is not None, **shard))
        return batches


class RanksDisagree(Exception):
    """Memory ran out on some ranks, and the others wait for them."""


def all_ranks_arrive(event: str, world_size: int, seconds: float) -> bool:
    """Whether all ranks call this within so many seconds. Through the store, as a rank that hangs in a collective takes part in none."""
    store = dist.PrefixStore("benchmark_training", dist.distributed_c10d._get_default_store())
    store.set(f"{event}/{dist.get_rank()}", "here")
    try:
        store.wait([f"{event}/{rank}" for rank in range(world_size)], timedelta(seconds=seconds))
    except (dist.DistStoreError, RuntimeError):  # RuntimeError: file stores
        return False
    return True


def series(
    context: int,
    lengths: Sequence[int],
    recompute: Callable[[int, int], Sequence[str]],
    measure: Callable[[Setting], Row],
    recover: Callable[[], None],
) -> Iterator[Row]:
    """A row for each length, shortest first. `recompute(context, tokens)`: what to try, in order, until it fits in memory.

    Once a length does not fit, longer ones are not tried. When ranks disagree whether it fits, that row is the last and says so.
    """
    fits = True
    for tokens in sorted(lengths):
        row: Row = {"context": context, "tokens": tokens, "tokens_per_rank": tokens // context, "recompute": None}
        choices = recompute(context, tokens) if fits else ()
        fits, tried = False, []
        for choice in choices:
            try:
                row |= {"recompute": choice, **measure(Setting(context, tokens, choice))}
                fits = True
                break
            except torch.OutOfMemoryError as error:
                tried.append(choice)
                row |= {"recompute": None, "message": str(error).partition("\n")[0]}
            try:
                recover()  # outside of the `except` above, whose traceback holds the step's tensors
            except RanksDisagree:
                yield {**row, "out_of_memory_with_recompute": tried, "out_of_memory_on": "some ranks"}
                return
        if tried:
            row["out_of_memory_with_recompute"] = tried
        elif not fits:
            row["not_tried"] = "a shorter sequence did not fit"
        yield row


def comparable(rows: Sequence[Row], base: RunConfig, document_tokens: int | None) -> list[Row]:
    """Rows whose work for a token does not depend on the length of the sequence: `full` layers cost more in longer documents."""
    if not any(layer.options.window is None for layer in base.model.stack):
        return list(rows)
    return [row for row in rows if document_tokens is not None and row["tokens_per_rank"] % document_tokens == 0]


def weak_scaling(rows: Sequence[Row], num_layers: int) -> list[Row]:
    """Rows of several context ranks beside the row of one with as many tokens a rank, where both were recomputed alike."""
    alone = {(row["tokens"], row["recompute"]): row for row in rows if row["context"] == 1 and "step_ms" in row}
    pairs = []
    for row in rows:
        one = alone.get((row["tokens_per_rank"], row["recompute"]))
        if row["context"] > 1 and "step_ms" in row and one is not None:
            added = row["step_ms"] - one["step_ms"]
            pairs.append(
                {
                    "context": row["context"],
                    "tokens_per_rank": row["tokens_per_rank"],
                    "recompute": row["recompute"],
                    "one_context_rank_ms": one["step_ms"],
                    "step_ms": row["step_ms"],
                    "not_hidden_ms": added,
                    "not_hidden_ms_per_layer": added / num_layers,
                    "efficiency": one["step_ms"] / row["step_ms"],
                }
            )
    return pairs


def recompute_choices(base: RunConfig, asked: str, world_size: int, device: torch.device) -> Callable[[int, int], Sequence[str]]:
    def choices(context: int, tokens: int) -> Sequence[str]:
        if asked != "auto":
            return (asked,)
        if device.type != "cuda":
            return RECOMPUTE
        memory = ESTIMATE_SHARE * torch.cuda.get_device_properties(device).total_memory
        config = Setting(context, tokens, RECOMPUTE[0]).configure(base, world_size)
        return RECOMPUTE if estimate_memory(config, world_size).total < memory else RECOMPUTE[1:]

    return choices


def _largest(value: float, device: torch.device) -> float:
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time training steps over context ranks; start it with torchrun.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072, 524288], metavar="T", help="of a whole sequence")
    parser.add_argument("--context", type=int, nargs="+", metavar="C", help="context sizes (default: 1 and the number of ranks)")
    parser.add_argument("--config", type=Path, metavar="YAML", help="a run to take model, precision and optimizer from")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides of the configuration")
    parser.add_argument("--recompute", choices=["auto", "none", "selective", "full"], default="auto")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a length, after one that is not timed; one of long ones")
    parser.add_argument("--document-tokens", type=int, metavar="N", help="pack documents of N tokens (default: one document)")
    parser.add_argument("--commit", help="of the code, to be noted where there is no git checkout")
    parser.add_argument("--output", type=Path, metavar="JSON", help="written anew after every row")
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node=2 tools/benchmark_training.py")
    silence_known_warnings()
    joined_here = not dist.is_initialized()
    try:
        shape = () if arguments.config is not None else DEFAULT_SHAPE
        base = load_config(arguments.config or DEFAULT_CONFIG, [*shape, *arguments.set])
        return benchmark(arguments, base, [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if joined_here and dist.is_initialized():
            dist.destroy_process_group()


def benchmark(arguments: argparse.Namespace, base: RunConfig, command: Sequence[str]) -> int:
    if arguments.document_tokens is not None and arguments.document_tokens < 1:
        raise ConfigError(f"--document-tokens {arguments.document_tokens}: give at least 1, or leave it out for one document")
    device, world_size = choose_device(base.training.device), int(os.environ["WORLD_SIZE"])
    contexts = sorted(set(arguments.context or (1, world_size)))
    lengths = {
        context: sorted({*arguments.tokens, *(tokens // other for tokens in arguments.tokens for other in contexts if context == 1)})
        for context in contexts
    }
    bench, started = Bench(base, device, arguments.document_tokens), time.perf_counter()
    choose = recompute_choices(base, arguments.recompute, world_size, device)
    for context in contexts:  # what does not divide is refused before anything runs
        for tokens in lengths[context]:
            Setting(context, tokens, "none").configure(base, world_size).check_world(world_size)

    def say(text: str) -> None:
        if os.environ["RANK"] == "0":
            print(f"[{time.perf_counter() - started:6.1f} s] {text}", flush=True)

    shortest = min(arguments.tokens)
    sequences = math.lcm(*(Setting(c, shortest, "none").configure(base, world_size).training.global_batch_size for c in contexts))
    first = {context: bench.first_step(Setting(context, shortest, choose(context, shortest)[-1]), sequences) for context in contexts}
    say(f"{num_parameters(base.model):,} parameters; first loss and gradient norm by context size: {first}")
    # The loss is a mean over thousands of tokens: roundings average out (bf16: 4e-3 of each logit). The norm is dominated by few matrices.
    loss_tolerance, norm_tolerance = (5e-4, 2e-2) if base.training.precision == "bf16" else (2e-6, 1e-4)
    wanted = first[contexts[0]]
    for context, (loss, norm) in first.items():
        near = math.isclose(loss, wanted[0], rel_tol=loss_tolerance) and math.isclose(norm, wanted[1], rel_tol=norm_tolerance)
        if not near:
            raise ConfigError(f"context size {context} gives loss {loss} and gradient norm {norm}, context size {contexts[0]} {wanted}")

    def measure(setting: Setting) -> Row:
        row = bench.measure(setting, arguments.steps)
        say(f"{setting}: {row['step_ms']:,.0f} ms, {row['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, {row['peak_bytes'] / 1e9:.1f} GB")
        return row

    result: dict[str, Any] = {
        "environment": measurement_facts(device, command, arguments.commit) | {"ranks": world_size},
        "model": base.model.model_dump(mode="json") | {"parameters": num_parameters(base.model)},
        "precision": base.training.precision,
        "document_tokens": arguments.document_tokens,
        "first_step": {str(context): {"loss": loss, "grad_norm": norm} for context, (loss, norm) in first.items()},
        "rows": [],
        "weak_scaling": [],
    }
    for row in (row for c in reversed(contexts) for row in series(c, lengths[c], choose, measure, bench.recover)):
        config = Setting(row["context"], row["tokens"], "none").configure(base, world_size)
        row["data"] = config.training.global_batch_size
        row["bytes_sent_per_layer"] = bytes_sent_per_layer(config)
        result["rows"].append(row)
        result["weak_scaling"] = weak_scaling(comparable(result["rows"], base, arguments.document_tokens), base.model.num_layers)
        stuck = "out_of_memory_on" in row
        # All ranks have the same numbers, so any that is not stuck can write them.
        if arguments.output is not None and (stuck or os.environ["RANK"] == "0"):
            write_atomically(arguments.output, json.dumps(result, indent=2) + "\n")
        if "step_ms" not in row:
            say(f"{row}")
        if stuck:
            print(f"memory ran out on rank {os.environ['RANK']} but not on all; the others wait for it", file=sys.stderr, flush=True)
            os._exit(1)  # joins nothing: the launcher ends the others
    say("done\n" + json.dumps(result["weak_scaling"], indent=2))
    if bench.failures:
        # Seen on two GPUs: after a step that memory cut off, destroying NCCL's groups never returns.
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)
    bench.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
