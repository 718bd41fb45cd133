"""Copies of a weight that every tensor rank holds must get one gradient: a kind that forgets the sum is stopped in its first step."""

from __future__ import annotations

import pytest

from nha_megatron.config import ConfigError
from nha_megatron.engine.create import create_engine
from nha_megatron.engine.device import choose_device
from nha_megatron.engine.layout import create_layout
from tests.distributed import RankPool
from tests.engine.programs import micro_batches, tiny_config


def step_without_the_sum(engine: str) -> str:
    """One step of TP 2 with sequence parallelism, after the mark was taken from a norm. Returns the message it ended with."""
    import nha_megatron.layers.norms as norms

    build = norms.RMSNorm.__init__

    def unmarked(self: norms.RMSNorm, *args: object, **kwargs: object) -> None:
        build(self, *args, **kwargs)  # type: ignore[arg-type]
        self.weight.sequence_parallel = False

    config = tiny_config(parallel={"tensor": 2, "sequence": True}, training={"engine": engine})
    device = choose_device("cpu")
    norms.RMSNorm.__init__ = unmarked  # type: ignore[method-assign, assignment]
    try:
        made = create_engine(config, device, create_layout(config, device))
    finally:
        norms.RMSNorm.__init__ = build  # type: ignore[method-assign]
    try:
        made.train_step(micro_batches(config, made.layout, 0), 1e-3)
    except ConfigError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_a_missing_sum_is_named(ranks: RankPool, engine: str) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    for message in ranks.run(2, step_without_the_sum, engine=engine):
        assert "different gradients of 9 weight(s)" in message  # two norms in each of four layers, and the last one
        assert "input_layernorm.weight" in message and "sequence_parallel = True" in message
