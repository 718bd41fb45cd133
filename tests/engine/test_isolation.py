"""Documents of one sequence do not touch each other, through the whole model and in every layout: not by one bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nha_megatron.data import Batch
from nha_megatron.engine.megatron import MegatronEngine
from tests.distributed import RankPool
from tests.engine.programs import SEQUENCE, full_gradients, make_engine, micro_batches, tiny_config
from tests.engine.test_parallel_parity import LAYOUTS

BOUNDARIES = (5, 29, 40)
CHANGED = slice(5, 29)  # one document: before, over and behind the edge of a shard of CP 4, up to the window of the next document
HYBRID = {"window": "16,full,0,40"}


def change_a_document(config: Any) -> dict[str, Any]:
    """Loss and every gradient of all other documents, before and after the tokens of one change."""
    engine = make_engine(config)
    with_boundaries = {"documents": BOUNDARIES}
    return {
        "before": of_the_others(engine, changed=False, **with_boundaries),
        "after": of_the_others(engine, changed=True, **with_boundaries),
        "before, as one document": of_the_others(engine, changed=False),
        "after, as one document": of_the_others(engine, changed=True),
    }


def of_the_others(engine: MegatronEngine, changed: bool, **options: Any) -> tuple[float, dict[str, Tensor]]:
    batches = micro_batches(engine.config, engine.layout, 0, **options)
    loss, _ = engine._accumulate_gradients([with_document(batch, engine, changed) for batch in batches])
    return loss, full_gradients(engine)


def with_document(batch: Batch, engine: MegatronEngine, changed: bool) -> Batch:
    """Without the loss of the document in the first row, and with other tokens in it."""
    tokens = batch.tokens.shape[1]
    own = slice(max(0, CHANGED.start - engine.layout.cp_rank * tokens), max(0, CHANGED.stop - engine.layout.cp_rank * tokens))
    batch.loss_mask[0, own] = 0
    if changed:
        batch.tokens[0, own] = (batch.tokens[0, own] + 7) % engine.config.model.vocab_size
    return batch


QUICK = {"cp2", "tp2_cp2"}


@pytest.mark.parametrize("layout", ["one", *(name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS)])
def test_other_documents_keep_every_bit(ranks: RankPool, layout: str) -> None:
    world_size, parallel = LAYOUTS.get(layout, (1, {}))
    config = tiny_config(model=HYBRID, parallel=parallel, training={"micro_batch_size": 2, "global_batch_size": 8})
    assert config.data.sequence_length == SEQUENCE > CHANGED.stop
    for result in ranks.run(world_size, change_a_document, timeout=60.0 * max(2, world_size), config=config):
        (loss, gradients), (loss_after, gradients_after) = result["before"], result["after"]
        assert loss == loss_after
        for name, gradient in gradients.items():
            assert torch.equal(gradient, gradients_after[name]), name
        # The change is not lost on the way: without boundaries it shows.
        assert result["before, as one document"][0] != result["after, as one document"][0]
