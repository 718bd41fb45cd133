"""The whole model over 2, 3, 4 and 8 context ranks: a hybrid stack with every kind of window at once, packed or not, any recomputation."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import RankPool
from tests.engine.programs import tiny_config, train
from tests.engine.test_parallel_parity import assert_same_training, join_stages

SHARD = 8
# One token; one less than a shard, a shard, one more; three shards, as wide as the sequence of CP 3; all tokens; slots alone.
WINDOWS = f"1,{SHARD - 1},{SHARD},{SHARD + 1},{3 * SHARD},full,0"
# Documents shorter than most windows, ending one token before, at and behind the edges of shards, and one over all the others.
DOCUMENTS = (2, 3, 7, 8, 9, 15)


# As in test_parallel_parity.py, for seven layers instead of four.
GRADIENTS = 1e-5


def run(ranks: RankPool, context: int, tokens: int, documents: tuple[int, ...], **sections: Any) -> dict[str, Any]:
    config = tiny_config(
        model={"num_layers": 7, "window": WINDOWS},
        data={"sequence_length": tokens},
        parallel={"context": context} | sections.pop("parallel", {}),
        training={"micro_batch_size": 2, "global_batch_size": 2} | sections.pop("training", {}),
    )
    results = ranks.run(context, train, timeout=120.0 * context, config=config, steps=3, documents=documents)
    return join_stages(results)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [(), DOCUMENTS], ids=["unpacked", "packed"])
@pytest.mark.parametrize("context", [2, 3, 4, 8])
def test_hybrid_stack_trains_like_one_rank(ranks: RankPool, context: int, documents: tuple[int, ...]) -> None:
    tokens = context * SHARD
    one = run(ranks, 1, tokens, documents)
    recompute = {2: "none", 3: "selective", 4: "full", 8: "selective"}[context]
    # Four query heads: whole sequences of heads go over 2 and 4 ranks, over 3 and 8 all keys are gathered.
    assert_same_training(run(ranks, context, tokens, documents, training={"recompute": recompute}), one, gradients=GRADIENTS)
    if context in (2, 4):
        gathered = {"parallel": {"cp_comm_type": "all_gather"}, "training": {"recompute": "full"}}
        assert_same_training(run(ranks, context, tokens, documents, **gathered), one, gradients=GRADIENTS)
