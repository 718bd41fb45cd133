"""On a GPU no layer makes the host wait: it runs ahead of the device, through the exchange between context ranks too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nha_megatron.layers.documents import Documents
from nha_megatron.layers.nha.layer import NativeHybridAttention
from tests.distributed import RankPool
from tests.engine.programs import make_engine, tiny_config

pytestmark = pytest.mark.gpu

TOKENS, ROWS, HIDDEN = 512, 2, 256
MODEL = {"hidden_size": HIDDEN, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "num_slots": 64, "window": "64,64,600,full"}


def forward_and_backward_without_waiting(context: int, exchange: str, recompute: str) -> list[str]:
    """What made the host wait, by layer, documents and pass; the layers have run before, so that kernels are compiled."""
    config = tiny_config(
        model=MODEL,
        parallel={"context": context, "cp_comm_type": exchange},
        data={"sequence_length": TOKENS},
        training={"device": "cuda", "precision": "bf16", "recompute": recompute},
    )
    engine = make_engine(config)
    layers = [module for module in engine.model_chunks[0].modules() if isinstance(module, NativeHybridAttention)]
    hidden = torch.randn(TOKENS // context, ROWS, HIDDEN, device=engine.device, dtype=torch.bfloat16, requires_grad=True)
    waited = []
    for layer in layers:
        # Other boundaries in the second pass than in the first: what is made for new ones must not wait either.
        for passes in ([None, None], [(0, 100, 255, 700, 1024), (0, 30, 256, 257, 1024)]):
            for number, edges in enumerate(passes):
                torch.cuda.set_sync_debug_mode("error" if number else "default")
                try:
                    documents = None if edges is None else Documents.on(engine.device, torch.tensor(edges, dtype=torch.int32))
                    out, _ = layer(hidden, packed_seq_params=documents)
                    out.backward(torch.ones_like(out))
                except RuntimeError as error:
                    if "synchronizing" not in str(error):
                        raise
                    waited.append(f"window {layer.options.window}, documents {edges}: {error}")
                finally:
                    torch.cuda.set_sync_debug_mode("default")
    return waited


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_one_gpu(ranks: RankPool, recompute: str) -> None:
    assert ranks.run(1, forward_and_backward_without_waiting, backend="nccl", context=1, exchange="auto", recompute=recompute) == [[]]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("exchange", ["a2a", "all_gather"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_two_context_ranks(ranks: RankPool, recompute: str, exchange: str) -> None:
    program = {"context": 2, "exchange": exchange, "recompute": recompute}
    assert ranks.run(2, forward_and_backward_without_waiting, backend="nccl", timeout=120.0, **program) == [[], []]


def wait_for_the_device(_: Any = None) -> str:
    x = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        x.item()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "not seen"


def test_waiting_would_be_seen(ranks: RankPool) -> None:
    assert "synchronizing" in ranks.run(1, wait_for_the_device, backend="nccl")[0]
