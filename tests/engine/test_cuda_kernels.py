"""Training whose attention the fused kernels compute, several GPUs against one. The PyTorch form is switched off: no call may use it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import pytest
import torch

from nha_kernels import register_backend
from nha_kernels.chunked import chunked_attention
from tests.distributed import RankPool
from tests.engine.programs import tiny_config, train
from tests.engine.test_parallel_parity import CP, CP4, INTERLEAVED, PP, SP, TP, assert_same_training, join_stages

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
four_gpus = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices")

SEQUENCE = 512
# Heads of 64 and of 128 channels. In float32 with windows that are fused; in bfloat16 also `full` layers, which a library attends.
EXACT = {"hidden_size": 256, "ffn_hidden_size": 384, "num_heads": 4, "num_kv_heads": 2, "num_slots": 16, "window": "64,64,0,64"}
HYBRID = {"hidden_size": 256, "ffn_hidden_size": 384, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "num_slots": 64}
HYBRID |= {"window": "64*3,full"}
# Before, in, at and right behind the edge between two shards of 256 tokens; shorter than the window; over both shards.
DOCUMENTS = (5, 29, 210, 250, 256, 258, 400)


def refuse() -> NoReturn:
    raise AssertionError("the kernels refused a call that this test expects them to serve")


def train_by_kernels(config: Any, **options: Any) -> dict[str, Any]:
    register_backend("torch", refuse)
    try:
        return train(config, **options)
    finally:
        register_backend("torch", lambda: chunked_attention)


def config_of(model: dict[str, Any], parallel: dict[str, Any] | None = None, **training: Any) -> Any:
    scaled = {"init_std": 0.05, **model}  # as far from uniform attention as the tiny model
    return tiny_config(model=scaled, parallel=parallel or {}, data={"sequence_length": SEQUENCE}, training={"device": "cuda"} | training)


@pytest.fixture(scope="module")
def run(ranks: RankPool) -> Callable[..., dict[str, Any]]:
    """run(parallel, model, documents, gpus, **section training) -> `train`, over two GPUs unless told or, without layout, on one."""

    @cache
    def results(world_size: int, parallel: Any, model: str, documents: Any, training: Any) -> dict[str, Any]:
        config = config_of({"exact": EXACT, "hybrid": HYBRID}[model], dict(parallel or ()), **dict(training))
        # Most of it is compiling.
        options = {"documents": documents, "timeout": 120.0, "backend": "nccl"}
        return join_stages(ranks.run(world_size, train_by_kernels, config=config, **options))

    def run(
        parallel: dict[str, Any] | None, model: str = "exact", documents: Any = False, gpus: int = 2, **training: Any
    ) -> dict[str, Any]:
        layout = None if parallel is None else tuple(parallel.items())
        return results(1 if parallel is None else gpus, layout, model, documents, tuple(training.items()))

    return run


# Products in three tf32 parts lose 2e-7 of each summand, like fp32; chunks of tokens begin elsewhere on the second rank.
KERNELS_FP32 = 2e-5


@two_gpus
@pytest.mark.parametrize("parallel", [CP, TP, SP, PP, INTERLEAVED, {}], ids=str)
def test_two_gpus_equal_one(run: Callable[..., dict[str, Any]], parallel: dict[str, Any]) -> None:
    assert_same_training(run(parallel), run(None), gradients=KERNELS_FP32)


# All pairs with context parallelism, and what the two context ranks leave of four GPUs as data parallel.
FOUR = [CP4, TP | CP, SP | CP, PP | CP, INTERLEAVED | CP, CP]


@four_gpus
@pytest.mark.parametrize("parallel", FOUR, ids=str)
def test_four_gpus_equal_one(run: Callable[..., dict[str, Any]], parallel: dict[str, Any]) -> None:
    assert_same_training(run(parallel, gpus=4), run(None), gradients=KERNELS_FP32)


@four_gpus
@pytest.mark.parametrize("parallel", [CP4, SP | CP, PP | CP], ids=str)
def test_packed_documents_over_four_gpus(run: Callable[..., dict[str, Any]], parallel: dict[str, Any]) -> None:
    packed = {"documents": DOCUMENTS, "micro_batch_size": 2}
    assert_same_training(run(parallel, gpus=4, **packed), run(None, **packed), gradients=KERNELS_FP32)


@two_gpus
def test_packed_documents_over_context_ranks(run: Callable[..., dict[str, Any]]) -> None:
    packed = {"documents": DOCUMENTS, "micro_batch_size": 2}
    one = run(None, **packed)
    assert_same_training(run(CP, **packed), one, gradients=KERNELS_FP32)
    assert one["losses"][0] != run(None)["losses"][0], "the boundaries must matter"


@two_gpus
@pytest.mark.parametrize("documents", [False, DOCUMENTS], ids=["one_document", "packed"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_over_context_ranks_changes_no_bit(run: Callable[..., dict[str, Any]], recompute: str, documents: Any) -> None:
    packed = {"documents": documents, "micro_batch_size": 2} if documents else {}
    expected, result = run(CP, **packed), run(CP, **packed, recompute=recompute)
    assert result["losses"] == expected["losses"] and result["grad_norms"] == expected["grad_norms"]
    for name, gradient in expected["gradients"].items():
        assert torch.equal(result["gradients"][name], gradient), name


def assert_same_in_bfloat16(result: dict[str, Any], expected: dict[str, Any]) -> None:
    # 8 bits: 4e-3 of each activation, averaged over 2048 tokens of loss.
    assert result["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    for name, gradient in expected["gradients"].items():
        # Roundings of a dozen operations on the way; a lost or doubled term would be of the gradient's own size.
        assert (result["gradients"][name] - gradient).norm() <= 5e-2 * gradient.norm(), name


@two_gpus
@pytest.mark.parametrize("documents", [False, DOCUMENTS], ids=["one_document", "packed"])
@pytest.mark.parametrize("exchange", ["a2a", "all_gather"])
def test_hybrid_stack_over_context_ranks(run: Callable[..., dict[str, Any]], exchange: str, documents: Any) -> None:
    packed: dict[str, Any] = {"documents": documents, "micro_batch_size": 2} if documents else {}
    one = run(None, "hybrid", precision="bf16", **packed)
    two = run(CP | {"cp_comm_type": exchange}, "hybrid", precision="bf16", **packed)
    assert_same_in_bfloat16(two, one)


@four_gpus
@pytest.mark.parametrize("exchange", ["a2a", "all_gather"])
@pytest.mark.parametrize("parallel", [CP4, SP | CP, PP | CP], ids=str)
def test_hybrid_stack_over_four_gpus(run: Callable[..., dict[str, Any]], parallel: dict[str, Any], exchange: str) -> None:
    packed: dict[str, Any] = {"documents": DOCUMENTS, "micro_batch_size": 2, "precision": "bf16"}
    four = run(parallel | {"cp_comm_type": exchange}, "hybrid", gpus=4, **packed)
    assert_same_in_bfloat16(four, run(None, "hybrid", **packed))


@two_gpus
@pytest.mark.parametrize("parallel", [SP, PP, {}], ids=str)
def test_hybrid_stack_in_other_layouts(run: Callable[..., dict[str, Any]], parallel: dict[str, Any]) -> None:
    assert_same_in_bfloat16(run(parallel, "hybrid", precision="bf16"), run(None, "hybrid", precision="bf16"))


def test_the_kernels_train_like_pytorch(ranks: RankPool, run: Callable[..., dict[str, Any]]) -> None:
    """One GPU, whole training: forward, every gradient and a curve by the kernels against the chunked form."""

    (pytorch,) = ranks.run(1, train_by_pytorch, backend="nccl", config=config_of(EXACT))
    assert_same_training(run(None), pytorch, gradients=KERNELS_FP32)


def train_by_pytorch(config: Any) -> dict[str, Any]:
    from nha_kernels.backends import _BACKENDS

    kernels = _BACKENDS["attention"].pop("triton")
    try:
        return train(config)
    finally:
        _BACKENDS["attention"]["triton"] = kernels
