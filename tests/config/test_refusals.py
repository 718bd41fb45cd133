"""What the system cannot do yet is refused with the reason and the alternative. A refusal goes together with its test."""

import pytest

from nha_megatron.config import ConfigError
from tests.config.cases import run

REFUSALS = {
    "deepspeed with a pipeline": (
        {"training": {"engine": "deepspeed"}, "parallel": {"pipeline": 2}},
        ["training.engine deepspeed with parallel.pipeline 2", "use training.engine megatron", "ZeRO stage 3"],
    ),
    "stages with another layout under deepspeed": (
        {"training": {"engine": "deepspeed", "stages": [{"from_tokens": 2000, "context": 2}]}},
        ["training.stages with context or recompute under training.engine deepspeed", "use training.engine megatron"],
    ),
    "stages with another recomputation under deepspeed": (
        {"training": {"engine": "deepspeed", "stages": [{"from_tokens": 2000, "recompute": "full"}]}},
        ["training.stages with context or recompute under training.engine deepspeed"],
    ),
}


@pytest.mark.parametrize(("sections", "parts"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_with_reason_and_alternative(sections, parts):
    with pytest.raises(ConfigError) as refusal:
        run(**sections)
    message = str(refusal.value)
    assert "not supported yet, because" in message and "\n" not in message
    for part in parts:
        assert part in message


ALLOWED = {
    "window wider than a shard": {"model": {"window": 65}, "parallel": {"context": 2}},
    "slots alone under context parallelism": {"model": {"window": 0}, "parallel": {"context": 4}},
    "full layers over context ranks": {"model": {"window": "16*3,full"}, "parallel": {"context": 2, "cp_comm_type": "a2a"}},
    "full layers whose heads do not divide": {
        "model": {"window": "16*3,full"},
        "data": {"sequence_length": 120},
        "parallel": {"context": 3},
    },
    "window beyond the sequence": {"model": {"window": 1000}},
    "isolated documents over context ranks": {"data": {"packing": "concat"}, "parallel": {"context": 2}},
    "packed documents over context ranks": {"data": {"packing": "best_fit"}, "parallel": {"context": 2}},
    "every axis that deepspeed has": {
        "training": {"engine": "deepspeed"},
        "parallel": {"tensor": 2, "sequence": True, "context": 2},
    },
    "stages of one layout under deepspeed": {"training": {"engine": "deepspeed", "stages": [{"from_tokens": 2000, "sequence_length": 64}]}},
    "all axes": {"parallel": {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2, "context": 2}},
}


@pytest.mark.parametrize("sections", ALLOWED.values(), ids=ALLOWED.keys())
def test_the_neighbours_of_a_refusal_are_allowed(sections):
    run(**sections)
