"""The training loop: one update after the other, with what hangs on each."""

from __future__ import annotations

import signal
import time
from contextlib import closing
from typing import Any

from nha_megatron.checkpoint import Progress
from nha_megatron.config import ConfigError
from nha_megatron.config.stage_plan import Stage
from nha_megatron.engine.base import Engine
from nha_megatron.training import layer_statistics
from nha_megatron.training.console import Console, print_line
from nha_megatron.training.context import TrainingContext
from nha_megatron.training.guards import LossGuard, TrainingError
from nha_megatron.training.hardware import memory_high_water
from nha_megatron.training.profiler import StepProfiler
from nha_megatron.training.schedule import learning_rate
from nha_megatron.training.signals import StopRequest
from nha_megatron.training.slow_ranks import RankReports, WorkClock, modules_without_collectives
from nha_megatron.training.stage_data import StageData
from nha_megatron.training.throughput import Throughput


def train(context: TrainingContext, progress: Progress, until: int) -> signal.Signals | None:
    """Trains from `progress`, which it advances, to step `until`; saves on the way and at the end.

    The data position follows from the step alone (training/stage_data.py).
    Returns the signal that ended the run early, with the run saved, or None when it is there.
    Raises `TrainingError` when the guards give the run up (training/guards.py). Collective over all ranks.
    """
    config, engine, layout, data = context.config, context.engine, context.layout, context.data
    reporter, saver, watch = context.reporter, context.saver, context.watch
    total = config.training.steps
    guard = LossGuard(config.guards, progress.guards)
    owed = False  # a checkpoint was due after a skipped step
    stages = config.stages
    clock = WorkClock(list(modules_without_collectives(engine)), layout.device)
    ranks = RankReports(layout, config.guards.slow_rank_ratio)
    say = print_line if reporter is None else reporter.console.event
    profiler = StepProfiler(config, layout.rank, layout.device, say)
    with StopRequest() as stop, closing(profiler):
        while progress.step < until:
            step = progress.step + 1
            stage = next(stage for stage in stages if step <= stage.last_step)
            if data.stage is not stage:
                data.begin(stage, layout)
                engine.begin_stage(stage.config)
                throughput = Throughput(stage.config, layout.device, layout.world_size)
                if step == stage.steps_before + 1:
                    guard.begin_stage()
                if reporter is not None:
                    _announce(reporter.console, stage, len(stages), data.padding_share)
            started = time.perf_counter()
            lr = learning_rate(step - stage.schedule_begins, stage.config.optimizer, stage.config.training.steps)
            measure_layers = _due(step, config.logging.layer_statistics, total)
            if measure_layers:
                layer_statistics.request(engine.model_chunks, config.model.stack)
            report_ranks = _due(step, config.logging.every, total)
            if report_ranks:
                clock.start()
            watch.enter(step, "data")
            profiler.begin(step)
            batches = data.training_batches(step)
            clock.batches_are_read()
            watch.enter(step, "update")
            result = engine.train_step(batches, lr, guard.max_loss)
            warnings = [guard.observe(step, result.loss, result.grad_norm, result.skipped)]
            # Waits for the update itself on an accelerator, so it belongs to the time of the step.
            stopped_by = stop.agreed(layout.device, layout.world)
            seconds = time.perf_counter() - started

            profiler.end(step)
            progress.step = step
            progress.guards = guard.state()
            progress.tokens += stage.tokens_per_step
            record: dict[str, Any] = {
                "step": step,
                "time": time.time(),
                "step_seconds": seconds,
                "tokens": progress.tokens,
                "epoch": data.epoch(step),
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": lr,
                "skipped": guard.skipped,
                **throughput.measure(seconds),
            }
            if report_ranks:
                slowest, warning = ranks.gather(step, clock.stop(), seconds)
                record |= slowest
                warnings.append(warning)
            record["memory"] = max(ranks.memory, memory_high_water(layout.device))
            if measure_layers:
                record |= layer_statistics.collect(engine.model_chunks, config.model.stack, layout.device, layout.world)
            if _due(step, config.training.validate_every, total):
                watch.enter(step, "validation")
                record["validation_loss"] = evaluate(engine, data, config.training.validate_batches)
            if reporter is not None:
                reporter.step(record, throughput.seconds_left(stages[-1].tokens_after - progress.tokens), warnings)

            watch.enter(step, "checkpoint")
            saver.poll()
            last = stopped_by is not None or step == until
            owed = owed or _due(step, config.checkpoint.every, total)
            if last and result.skipped:
                require_finite_weights(engine, step)
            # After a skipped step the run may be about to be given up: then its newest checkpoint is one from before.
            if last or (owed and not result.skipped):
                saver.save(progress, last=last)
                owed = False
            if stopped_by:
                return stopped_by
    return None


def require_finite_weights(engine: Engine, step: int) -> None:
    """Raises `TrainingError` on all ranks when a weight of any rank is not finite. Collective."""
    if not engine.finite_weights():
        raise TrainingError(
            f"the run ends with step {step}, which was skipped, and its weights are not finite: nothing was saved. Resume from an older "
            "checkpoint with a lower optimizer.lr, a longer optimizer.warmup_steps or a lower optimizer.clip_grad"
        )


def evaluate(engine: Engine, data: StageData, batches: int) -> float:
    """Mean loss, in nats, over the counted tokens of the first `batches` global batches: the same tokens at every evaluation of a stage."""
    loss_sum, tokens = 0.0, 0
    for index in range(batches):
        batch_loss, batch_tokens = engine.evaluate(data.validation_batches(index))
        loss_sum += batch_loss
        tokens += batch_tokens
    if tokens == 0:
        raise ConfigError(f"the first {batches} validation batches have no token that counts; check data.validation")
    return loss_sum / tokens


def _announce(console: Console, stage: Stage, stages: int, padding_share: float) -> None:
    data, training = stage.config.data, stage.config.training
    if stages > 1:
        console.event(
            f"stage {stage.number} of {stages}: steps {stage.steps_before + 1:,} to {stage.last_step:,}, from token "
            f"{stage.tokens_before:,}, {training.global_batch_size} x {data.sequence_length:,} tokens a step"
        )
    if data.packing == "best_fit":
        console.event(f"packed samples: {padding_share:.2%} of the places of a training sample are padding")


def _due(step: int, every: int | None, total: int) -> bool:
    """Whether something done every `every` steps, and at the end of the run, is due after `step`. None: never."""
    return every is not None and (step % every == 0 or step == total)
