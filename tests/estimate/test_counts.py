"""Counts against published models, hand calculation and the objects that are counted."""

from dataclasses import replace

import pytest
import torch

from nha_kernels import nha_attention
from nha_megatron.config import ConfigError, ModelConfig
from nha_megatron.estimate.counts import flops_per_token, num_parameters, state_bytes
from nha_megatron.layers.kind import RankShape
from nha_megatron.layers.nha.context_parallel.cost import context_parallel_bytes, context_parallel_pieces
from nha_megatron.layers.nha.context_parallel.plan import plan_context_parallel
from nha_megatron.layers.nha.cost import mean_visible_tokens
from tests.config.cases import model

CONVERTED = {"value_activation": "none", "output_norm": "none"}
LLAMA3_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_heads": 32,
    "num_kv_heads": 8,
    "vocab_size": 128256,
    **CONVERTED,
}
QWEN2_0_5B = {
    "num_layers": 24,
    "hidden_size": 896,
    "ffn_hidden_size": 4864,
    "num_heads": 14,
    "num_kv_heads": 2,
    "vocab_size": 151936,
    "qkv_bias": True,
    "tie_embeddings": True,
    **CONVERTED,
}
QWEN3_0_6B = {
    "num_layers": 28,
    "hidden_size": 1024,
    "ffn_hidden_size": 3072,
    "num_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "qk_norm": "rms",
    "tie_embeddings": True,
    **CONVERTED,
}


@pytest.mark.parametrize(
    ("shape", "published"),
    [(LLAMA3_8B, 8_030_261_248), (QWEN2_0_5B, 494_032_768), (QWEN3_0_6B, 596_049_920)],
    ids=["Llama-3-8B", "Qwen2.5-0.5B", "Qwen3-0.6B"],
)
def test_parameters_are_the_published_ones_plus_the_gates(shape, published):
    # All three vocabularies are multiples of 128 already, so no padding is added.
    gates = shape["num_layers"] * shape["num_kv_heads"] * 64 * shape["hidden_size"]
    assert num_parameters(ModelConfig(**shape)) == published + gates


def test_parameters_by_hand():
    # q, k, v: 64 x (64 + 32 + 32) = 8192; gate: 64 x 2 x 8 = 1024; out: 64 x 64 = 4096; output norm: 64; MLP: 3 x 64 x 128 = 24576;
    # two norms: 128. One block 38080, four 152320; final norm 64; vocabulary 256 x 64 = 16384, twice.
    assert num_parameters(model(), embeddings=False) == 4 * 38080 + 64
    assert num_parameters(model()) == 4 * 38080 + 64 + 2 * 16384
    assert num_parameters(model(tie_embeddings=True)) == 4 * 38080 + 64 + 16384
    # A bias for 64 + 32 + 32 rows, norms of 16 channels for q and k, no norm of 64 channels.
    assert num_parameters(model(qkv_bias=True)) - num_parameters(model()) == 4 * 128
    assert num_parameters(model(qk_norm="rms")) - num_parameters(model()) == 4 * 2 * 16
    assert num_parameters(model()) - num_parameters(model(output_norm="none")) == 4 * 64
    # Windows change no parameters: a layer can be made full and back.
    assert num_parameters(model(window="full")) == num_parameters(model())


@pytest.mark.parametrize(("vocabulary", "padded"), [(1, 128), (128, 128), (129, 256), (32000, 32000), (50257, 50304)])
def test_the_vocabulary_is_padded_to_a_multiple_of_128(vocabulary, padded):
    assert model(vocab_size=vocabulary).padded_vocab_size == padded


@pytest.mark.parametrize("window", [0, 1, 5, 16, 40, None])
def test_visible_tokens_are_counted_as_the_mask_shows_them(window):
    length = 16
    fills = [min(t + 1, length if window is None else window) for t in range(length)]
    assert mean_visible_tokens(window, length) == pytest.approx(sum(fills) / length, rel=1e-15)


def test_flops_by_hand():
    # Llama-3-8B heads, W = M = 64, far from the start: forward 2 (K + V) (HQ (M + W) + H M) = 512 x (32 x 128 + 8 x 64) a token and layer.
    shape = ModelConfig(**{**LLAMA3_8B, "num_layers": 1, "window": 64})
    # q, k, v 4096 x 6144, out 4096 x 4096, gate 4096 x 512, MLP 3 x 4096 x 14336, output matrix 128256 x 4096.
    matrices = 4096 * (6144 + 4096 + 512 + 3 * 14336 + 128256)
    attention = 512 * (32 * 128 + 8 * 64)
    # The window is not full in the first 63 of a million tokens: relative difference below 1e-6 of a small part.
    assert flops_per_token(shape, 1_000_000) == pytest.approx(3 * (2 * matrices + attention), rel=1e-6)

    # Causal softmax attention: half the square, 2 (K + V) HQ (S + 1) / 2 a token, and no slots.
    full = ModelConfig(**{**LLAMA3_8B, "num_layers": 1, "window": "full"})
    assert flops_per_token(full, 8191) == 3 * (2 * matrices + 512 * 32 * 4096)


def test_flops_of_windowed_layers_do_not_grow_with_the_length():
    windowed, full = model(window=16), model(window="16*3,full")
    assert flops_per_token(windowed, 2**20) == pytest.approx(flops_per_token(windowed, 2**17), rel=1e-3)
    assert flops_per_token(full, 2**20) > 7 * flops_per_token(full, 2**17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 5, 40, None])
def test_state_bytes_are_those_of_the_operators_memory(window, dtype):
    length, heads, slots, dim = 12, 2, 8, 16
    q = torch.randn(1, length, 4, dim, dtype=dtype)
    k, v = torch.randn(2, 1, length, heads, dim, dtype=dtype)
    g = torch.full((1, length, heads, slots), -0.5)
    _, memory = nha_attention(q, k, v, g, window=window, return_memory=True)

    layers = model(window="full" if window is None else window)
    assert state_bytes(layers, length, element_bytes=q.element_size()) == 4 * memory.num_bytes


def test_the_state_of_a_full_layer_depends_on_the_length():
    with pytest.raises(ConfigError, match="give the length"):
        state_bytes(model(window="16*3,full"))
    assert state_bytes(model(window=16)) == state_bytes(model(window=16), 16) == state_bytes(model(window=16), 10**6)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("window", [0, 1, 7, 8, 9, 16, 20, 64])
def test_announced_slot_summaries_are_those_of_the_plan(window, ranks):
    plan = plan_context_parallel(tokens_per_rank=8, num_ranks=ranks, rank=1, window=window)
    assert context_parallel_pieces(window, 8, ranks) == len(plan.pieces)


def test_bytes_sent_by_hand():
    # Llama-3-8B heads, bf16: halo of 64 tokens x 8 heads x (2 x 128 x 2 + 64 x 4) bytes; two summaries of 8 x 64 x 257 x 4 bytes.
    shape = ModelConfig(**{**LLAMA3_8B, "window": 64})
    halo, summary = 64 * 8 * 768, 8 * 64 * 257 * 4
    rank = RankShape(sequence_length=8 * 16384, context=8)
    assert context_parallel_bytes(shape, 64, 64, rank) == halo + 2 * summary
    assert context_parallel_bytes(shape, 64, 64, replace(rank, tensor=8, micro_batch_size=2)) == 2 * (halo + 2 * summary) // 8
    assert context_parallel_bytes(shape, 64, 64, replace(rank, element_bytes=4)) == 64 * 8 * 1280 + 2 * summary
    assert context_parallel_bytes(shape, 64, 64, RankShape(sequence_length=16384)) == 0
