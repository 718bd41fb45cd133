"""What the ranks run in the tests of the DeepSpeed engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nha_megatron.config import RunConfig
from nha_megatron.engine.base import Engine
from nha_megatron.engine.create import create_engine
from nha_megatron.engine.deepspeed import DeepSpeedEngine
from nha_megatron.engine.deepspeed.partitions import read
from nha_megatron.engine.deepspeed.setup import import_deepspeed
from nha_megatron.engine.device import choose_device
from nha_megatron.engine.layout import create_layout
from nha_megatron.model.parameters import full_from_shards
from tests.distributed import RankPool
from tests.engine.programs import CPU, micro_batches
from tests.training.small_run import pretrain_on_rank


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    """Section `training` of a run with ZeRO `stage`. Small buckets, so that there are several."""
    sizes = {"reduce_bucket_size": 20000, "allgather_bucket_size": 20000}
    if stage == 3:
        # Some weights stay whole on every rank, and the optimizer has several groups.
        sizes = {"reduce_bucket_size": 20000, "sub_group_size": 30000, "stage3_param_persistence_threshold": 100}
    return {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage, **sizes, **settings}}}


_TESTS_OF_A_POOL = 8
_tests = itertools.count(1)


@pytest.fixture
def few_threads(ranks: RankPool) -> Iterator[None]:
    """New ranks now and then: of an engine of ZeRO 3 its process groups stay, and gloo has threads for each."""
    yield
    if next(_tests) % _TESTS_OF_A_POOL == 0:
        ranks.close()


def as_in_a_new_process(device: torch.device) -> None:
    """ZeRO 3 numbers modules and weights over the life of a process, and all ranks must agree; those of the pool have run more or less."""
    import_deepspeed(device)  # before the imports below: for this accelerator
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0


_engines: list[Engine] = []


def close_engines() -> None:
    """The engine that the program before made on this rank goes: before DeepSpeed forgets the groups that it still uses."""
    while _engines:
        _engines.pop().close()


def make_engine(config: RunConfig) -> Engine:
    """An engine, in place of the one that the program before it made on this rank."""
    close_engines()
    device = choose_device(config.training.device)
    as_in_a_new_process(device)
    _engines.append(create_engine(config, device, create_layout(config, device)))
    return _engines[-1]


def train(config: RunConfig, steps: int = 5, **batch_options: Any) -> dict[str, Any]:
    """Initial weights, `steps` updates and a validation, whichever the engine."""
    engine = make_engine(config)
    assert isinstance(engine, DeepSpeedEngine)
    weights = full_weights(engine)
    results = [engine.train_step(micro_batches(config, engine.layout, step, **batch_options), config.optimizer.lr) for step in range(steps)]
    return {
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "tokens": [result.tokens for result in results],
        "validation": engine.evaluate(micro_batches(config, engine.layout, 99, **batch_options)),
        "weights": weights,
        "trained": full_weights(engine),
    }


def optimizer_without_a_compiler(config: RunConfig) -> tuple[str, bool | None]:
    """One update on a machine on which DeepSpeed could compile no operator of its own: (torch's optimizer, fused or not)."""
    close_engines()
    import_deepspeed(choose_device(config.training.device))
    from deepspeed.ops.op_builder.builder import OpBuilder

    def compile_operator(builder: Any, verbose: bool = True) -> Any:
        raise AssertionError(f"{builder.name} would be compiled")

    with mock.patch.object(OpBuilder, "jit_load", compile_operator):
        engine = make_engine(config)
        assert isinstance(engine, DeepSpeedEngine)
        assert not engine.train_step(micro_batches(config, engine.layout, 0), 1e-3).skipped
    adam = engine.optimizer.optimizer
    (kind,) = {parent for parent in type(adam).__mro__ if parent.__module__ == "torch.optim.adamw"}
    return kind.__name__, adam.defaults["fused"]


def full_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The fp32 weights, joined over data, context and tensor ranks. Collective; the same on all ranks."""
    twins = dict(engine._twin.named_parameters())
    full = {}
    for name, parameter in engine.named_parameters():
        shard = read(parameter, "param")
        shards = [torch.empty_like(shard) for _ in range(engine.layout.tp_size)]
        dist.all_gather(shards, shard.contiguous(), group=engine.layout.groups.tp)
        full[name] = full_from_shards(shards, twins[name]).clone().cpu()
    return full


def pretrain(plain: dict[str, Any]) -> str | None:
    """The whole job, in a process that has run others: see `small_run.pretrain_on_rank`."""
    as_in_a_new_process(CPU)
    return pretrain_on_rank(plain)
