"""The chunked loss against plain cross entropy over the real vocabulary: the sum, every gradient, and what it holds at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nha_megatron.engine.layout import create_layout
from nha_megatron.estimate.logits import LOGITS_BYTES, logit_chunk_tokens
from nha_megatron.model.chunked_loss import linear_cross_entropy
from tests.distributed import RankPool
from tests.engine.programs import CPU, tiny_config
from tests.kernels.test_cost import LargestTensor

PADDED, HIDDEN, ROWS, BATCH = 128, 24, 14, 2


def inputs(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [s, b, h], weight [V, h], labels [b, s], mask [b, s]. Padding rows of the weight are large: they must not count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, BATCH, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    labels = torch.randint(0, vocabulary, (BATCH, ROWS), generator=generator)
    mask = (torch.rand(BATCH, ROWS, generator=generator) < 0.6).float()
    return hidden.to(dtype), weight.to(dtype), labels, mask


def expected_loss(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradients of hidden states and weight, all logits at once, in double precision from the inputs in `dtype`."""
    hidden, weight, labels, mask = inputs(vocabulary, dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden @ weight.t())[..., :vocabulary].transpose(0, 1)
    loss = (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum()
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def loss_on_rank(vocabulary: int, sequence: bool, chunk_tokens: int, dtype: torch.dtype, factor: float) -> tuple[float, Tensor, Tensor]:
    parallel = {"tensor": dist.get_world_size(), "sequence": sequence}
    layout = create_layout(tiny_config(parallel=parallel), CPU)
    hidden, weight, labels, mask = inputs(vocabulary, dtype)
    if sequence:
        hidden = hidden.chunk(layout.tp_size)[layout.tp_rank].clone()
    weight = weight.chunk(layout.tp_size)[layout.tp_rank].clone()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(
        hidden,
        weight,
        labels,
        mask,
        vocab_size=vocabulary,
        chunk_tokens=chunk_tokens,
        tp_group=layout.groups.tp,
        sequence_parallel=sequence,
    )
    (factor * loss).backward()
    return loss.item(), hidden.grad, weight.grad  # type: ignore[return-value]


def assert_equal_losses(ranks: RankPool, tolerance: float, tp_size: int, vocabulary: int, sequence: bool = False, **options: Any) -> None:
    dtype, factor = options.setdefault("dtype", torch.float32), options.setdefault("factor", 1.0)
    loss, *gradients = expected_loss(vocabulary, dtype)
    results = ranks.run(tp_size, loss_on_rank, vocabulary=vocabulary, sequence=sequence, **options)
    assert len({result[0] for result in results}) == 1, "ranks disagree about the loss"
    assert results[0][0] == pytest.approx(loss.item(), rel=tolerance)
    weight = torch.cat([result[2] for result in results])
    hiddens = [torch.cat([result[1] for result in results])] if sequence else [result[1] for result in results]
    assert weight.dtype is hiddens[0].dtype is dtype
    for name, gradient, wanted in [("weight", weight, gradients[1]), *(("hidden", hidden, gradients[0]) for hidden in hiddens)]:
        difference = (gradient - factor * wanted).norm() / (factor * wanted).norm()
        assert difference < tolerance, f"gradient of {name}: relative difference {difference:.1e}"
    assert not weight[vocabulary:].any()


# Sums of 24, 28 and 128 numbers in fp32, and exponentials of logits up to 20: about 20 * 6e-8.
FP32 = 2e-6


# 50 of 128: the second of two ranks holds nothing but padding.
@pytest.mark.parametrize("vocabulary", [128, 100, 50])
@pytest.mark.parametrize(("tp_size", "sequence"), [(1, False), (2, False), (2, True)], ids=["tp1", "tp2", "tp2_sp"])
def test_loss_and_gradients_leave_the_padding_out(ranks: RankPool, vocabulary: int, tp_size: int, sequence: bool) -> None:
    assert_equal_losses(ranks, FP32, tp_size, vocabulary, sequence, chunk_tokens=8)


# Less than one token of every row and rank, a length that leaves a rest, and all 28 tokens at once.
@pytest.mark.parametrize("chunk_tokens", [1, 12, 1000])
@pytest.mark.parametrize("sequence", [False, True])
def test_any_chunk_gives_the_same(ranks: RankPool, chunk_tokens: int, sequence: bool) -> None:
    assert_equal_losses(ranks, FP32, 2, 100, sequence, chunk_tokens=chunk_tokens)


def test_the_backward_scales_the_gradients(ranks: RankPool) -> None:
    assert_equal_losses(ranks, FP32, 2, 100, chunk_tokens=8, factor=-2.5)


@pytest.mark.parametrize("sequence", [False, True])
def test_bfloat16_weights(ranks: RankPool, sequence: bool) -> None:
    # Logits of size 5 rounded to 8 bits are off by up to 0.02, and so are probabilities; errors of single tokens average out in norms.
    assert_equal_losses(ranks, 2e-2, 2, 100, sequence, chunk_tokens=8, dtype=torch.bfloat16)


TOKENS, COLUMNS, CHUNK = 1024, 2048, 64


def largest_tensor(gradients: bool) -> tuple[int, int]:
    """Elements of the largest tensor of a loss over 1024 tokens and 2048 columns in chunks of 64 tokens, and of its gradients."""
    groups = create_layout(tiny_config(), CPU).groups
    hidden, weight = torch.randn(TOKENS, 1, HIDDEN, requires_grad=gradients), torch.randn(COLUMNS, HIDDEN, requires_grad=gradients)
    labels = torch.zeros(1, TOKENS, dtype=torch.int64)
    options = {"vocab_size": COLUMNS, "chunk_tokens": CHUNK, "tp_group": groups.tp, "sequence_parallel": False}
    with LargestTensor() as largest:
        loss = linear_cross_entropy(hidden, weight, labels, torch.ones(1, TOKENS), **options)
        if gradients:
            loss.backward()
    return largest.elements, max(hidden.numel(), weight.numel())


def test_never_more_logits_than_those_of_a_chunk(ranks: RankPool) -> None:
    ((elements, gradient),) = ranks.run(1, largest_tensor, gradients=True)
    assert elements == CHUNK * COLUMNS > gradient
    ((without, _),) = ranks.run(1, largest_tensor, gradients=False)
    assert without == CHUNK * COLUMNS


def gradients_twice() -> None:
    groups = create_layout(tiny_config(), CPU).groups
    hidden = torch.randn(4, 1, HIDDEN, requires_grad=True)
    labels = torch.zeros(1, 4, dtype=torch.int64)
    options = {"vocab_size": 128, "chunk_tokens": 2, "tp_group": groups.tp, "sequence_parallel": False}
    loss = linear_cross_entropy(hidden, torch.randn(128, HIDDEN), labels, torch.ones(1, 4), **options)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="can be taken once"):
        loss.backward()


def test_gradients_that_were_scaled_in_place_are_not_given_again(ranks: RankPool) -> None:
    ranks.run(1, gradients_twice)


@pytest.mark.parametrize("columns", [128, 1000, 32000, 128256, 10**9])
def test_chunk_within_its_bytes(columns: int) -> None:
    tokens = logit_chunk_tokens(columns)
    assert tokens % 128 == 0 and tokens >= 128
    assert 4 * columns * tokens <= LOGITS_BYTES or tokens == 128  # at least one tile, whatever the vocabulary
    assert 4 * columns * (tokens + 128) > LOGITS_BYTES


def losses_of_model(tied: bool) -> tuple[float, float]:
    """The loss of a LanguageModel given labels, and of the logits that it returns without labels."""
    from nha_megatron.model.build import build_model
    from nha_megatron.model.initialize import initialize_weights

    config = tiny_config(model={"tie_embeddings": tied})
    layout = create_layout(config, CPU)
    (model,) = build_model(config, CPU, layout.groups)
    initialize_weights([model], config.model, 0, 0, 1)
    tokens = torch.randint(0, config.model.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
    fields = {"position_ids": None, "attention_mask": None}
    loss = model(tokens[:, :-1], **fields, labels=tokens[:, 1:], loss_mask=torch.ones(2, 64))
    logits = model(tokens[:, :-1], **fields)[..., : config.model.vocab_size]
    return loss.item(), F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_gives_the_loss_of_its_logits(ranks: RankPool, tied: bool) -> None:
    ((loss, wanted),) = ranks.run(1, losses_of_model, tied=tied)
    assert loss == pytest.approx(wanted, rel=1e-6)  # fp32 sums over 100 columns


def memory_of_a_long_sequence(tokens: int, hidden: int, vocabulary: int) -> tuple[int, int]:
    """Bytes at the fullest moment of loss and backward beyond the inputs, and bytes of the gradients that they leave or accumulate."""
    device = torch.device("cuda", torch.cuda.current_device())
    groups = create_layout(tiny_config(training={"device": "cuda"}), device).groups
    states = torch.randn(tokens, 1, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, hidden, device=device)).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens), device=device)
    mask = torch.ones(1, tokens, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    chunk = logit_chunk_tokens(vocabulary)
    loss = linear_cross_entropy(
        states, weight, labels, mask, vocab_size=vocabulary, chunk_tokens=chunk, tp_group=groups.tp, sequence_parallel=False
    )
    loss.backward()
    assert loss.isfinite() and states.grad is not None and weight.grad is not None
    return torch.cuda.max_memory_allocated(device) - before, states.numel() * 2 + weight.numel() * 4


@pytest.mark.gpu
def test_logits_of_a_128k_sequence_never_exist(ranks: RankPool) -> None:
    """131,072 tokens, hidden size 2048, a vocabulary of 128,256, bf16: all logits would be 67 GB in fp32, 34 GB in bf16."""
    tokens, vocabulary = 131072, 128256
    ((peak, gradients),) = ranks.run(1, memory_of_a_long_sequence, backend="nccl", tokens=tokens, hidden=2048, vocabulary=vocabulary)
    # Beyond the gradients: a chunk's logits in fp32 (0.26 GB) and twice in bf16, and one product of the weight's shape in bf16 (0.53 GB).
    assert gradients == pytest.approx(1.59e9, rel=0.01)
    assert peak < gradients + 4 * LOGITS_BYTES + 2 * vocabulary * 2048 < 3.3e9
    assert peak < 0.05 * 4 * tokens * vocabulary


def z_loss_on_rank(z_loss: float | None) -> tuple[float, Tensor, Tensor]:
    """Program: value and gradients over all ranks' columns, in chunks; None: the argument is left out."""
    layout = create_layout(tiny_config(parallel={"tensor": dist.get_world_size()}), CPU)
    hidden, weight, labels, mask = inputs(100, torch.float32)
    weight = weight.chunk(layout.tp_size)[layout.tp_rank].clone()
    hidden.requires_grad_(), weight.requires_grad_()
    options = {} if z_loss is None else {"z_loss": z_loss}
    shape: dict[str, Any] = {"vocab_size": 100, "chunk_tokens": 8, "tp_group": layout.groups.tp, "sequence_parallel": False}
    loss = linear_cross_entropy(hidden, weight, labels, mask, **shape, **options)
    loss.backward()
    return loss.item(), hidden.grad, weight.grad  # type: ignore[return-value]


def test_z_loss_has_its_exact_gradient_and_is_bit_equal_when_off(ranks: RankPool) -> None:
    hidden, weight, labels, mask = inputs(100, torch.float32)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden @ weight.t())[..., :100].transpose(0, 1)
    cross_entropy = (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum()
    whole = cross_entropy + 0.1 * (logits.logsumexp(-1).square() * mask).sum()
    wanted = torch.autograd.grad(whole, (hidden, weight))

    results = ranks.run(2, z_loss_on_rank, z_loss=0.1)
    assert results[0][0] == pytest.approx(cross_entropy.item(), rel=1e-5)  # the value is without it
    for found, expected in ((results[0][1], wanted[0]), (torch.cat([result[2] for result in results]), wanted[1])):
        assert (found - expected).norm() / expected.norm() < 1e-5
    off, absent = ranks.run(2, z_loss_on_rank, z_loss=0.0)[0], ranks.run(2, z_loss_on_rank, z_loss=None)[0]
    assert off[0] == absent[0] and torch.equal(off[1], absent[1]) and torch.equal(off[2], absent[2])
