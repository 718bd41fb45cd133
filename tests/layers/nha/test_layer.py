"""The attention layer on its own: against the operator applied by hand, documents kept apart, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nha_kernels import nha_attention
from nha_megatron.engine.layout import create_layout
from nha_megatron.engine.megatron import MegatronEngine
from nha_megatron.layers.documents import Documents
from nha_megatron.layers.nha.layer import NativeHybridAttention
from tests.distributed import RankPool
from tests.engine.programs import CPU, micro_batches, tiny_config

CONVERTED = {"qk_norm": "rms", "qkv_bias": True, "output_norm": "none", "value_activation": "none", "empty_slots": "mask"}


def layer_of(
    model: dict[str, Any], number: int = 1, parallel: dict[str, Any] | None = None
) -> tuple[NativeHybridAttention, MegatronEngine]:
    config = tiny_config(model=model, parallel=parallel or {})
    engine = MegatronEngine(config, CPU, create_layout(config, CPU))
    generator = torch.Generator().manual_seed(5)
    layers = [module for module in engine.model_chunks[0].modules() if isinstance(module, NativeHybridAttention)]
    for name, parameter in layers[number - 1].named_parameters():
        if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide where they are applied
            parameter.data += 0.3 * torch.rand(parameter.shape, generator=generator)
        assert parameter.isfinite().all(), name
    return layers[number - 1]


def hidden_states(tokens: int = 20, rows: int = 2) -> Tensor:
    return torch.randn(tokens, rows, 64, generator=torch.Generator().manual_seed(1))


def by_hand(layer: NativeHybridAttention, hidden: Tensor, model: dict[str, Any]) -> Tensor:
    """The layer's formula, head by head, on plain weights; one row at a time through the token-by-token operator."""
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    rms = lambda x, weight: weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)  # noqa: E731
    rows = []
    for row in hidden.unbind(1):
        qkv = F.linear(row, weights["linear_qkv.weight"], weights.get("linear_qkv.bias"))
        queries, keys, values = [], [], []
        for group in qkv.chunk(2, -1):  # two KV heads: [q q k v | q q k v], 16 channels each
            *q, k, v = group.chunk(4, -1)
            queries += q
            keys.append(k)
            values.append(v)
        q, k, v = (torch.stack(heads, 1)[None] for heads in (queries, keys, values))
        if model.get("qk_norm") == "rms":
            q, k = rms(q, weights["q_layernorm.weight"]), rms(k, weights["k_layernorm.weight"])
        if model.get("value_activation", "silu") == "silu":
            v = F.silu(v)
        g = F.logsigmoid(F.linear(row, weights["linear_gate.weight"])).view(1, -1, 2, 6) / 8.0
        rope = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        out = nha_attention(
            q, k, v, g, window=layer.options.window, rope=rope, empty_slots=model.get("empty_slots", "attend"), backend="reference"
        ).flatten(2)
        if model.get("output_norm", "rms") == "rms":
            out = rms(F.silu(out), weights["output_norm.weight"])
        rows.append(F.linear(out[0], weights["linear_proj.weight"]))
    return torch.stack(rows, 1)


def compare_with_formula(model: dict[str, Any], number: int) -> float:
    layer = layer_of(model, number)
    hidden = hidden_states()
    with torch.no_grad():
        out, bias = layer(hidden)
        assert bias is None
        expected = by_hand(layer, hidden, model)
    return ((out - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("number", [1, 2, 3, 4], ids=["window16", "full", "slots_only", "window7"])
@pytest.mark.parametrize("model", [{}, CONVERTED], ids=["from_scratch", "converted"])
def test_layer_is_its_formula(ranks: RankPool, model: dict[str, Any], number: int) -> None:
    (error,) = ranks.run(1, compare_with_formula, model=model | {"window": "16,full,0,7"}, number=number)
    # fp32, sums of 64 products and a chunked against a token-by-token recurrence of 20 tokens.
    assert error < 3e-6


def change_first_document() -> tuple[bool, bool, float]:
    layer = layer_of({})
    hidden = hidden_states(tokens=16)
    changed = hidden.clone()
    changed[8, 0] += 1.0  # the last token of the document [0, 9) of row 0, inside the window of the next one
    documents = Documents.on(CPU, torch.tensor([0, 9, 16, 32], dtype=torch.int32))
    with torch.no_grad():
        before, after = (layer(x, packed_seq_params=documents)[0] for x in (hidden, changed))
        alone = layer(hidden[9:, :1])[0]
    others = torch.equal(before[9:, 0], after[9:, 0]) and torch.equal(before[:, 1], after[:, 1])
    return (
        torch.equal(before[:8, 0], after[:8, 0]) and not torch.equal(before[8, 0], after[8, 0]),
        others,
        (before[9:, :1] - alone).abs().max().item(),
    )


def test_documents_do_not_see_each_other(ranks: RankPool) -> None:
    ((causal, isolated, difference),) = ranks.run(1, change_first_document)
    assert causal and isolated
    # The same document at another place of the flattened rows: chunks differ, so fp32 sums do.
    assert difference < 1e-6


def statistics(parallel: dict[str, Any]) -> list[dict[str, float]]:
    config = tiny_config(model={"window": "16,3,0,full"}, parallel=parallel)
    engine = MegatronEngine(config, CPU, create_layout(config, CPU))
    layers = [module for module in engine.model_chunks[0].modules() if isinstance(module, NativeHybridAttention)]
    for layer in layers:
        layer.record_statistics = True
    engine.evaluate(micro_batches(config, engine.layout, 0)[:1])
    assert not any(layer.record_statistics for layer in layers)
    return [{name: value.item() for name, value in (layer.statistics or {}).items()} for layer in layers]


def test_statistics_are_the_same_over_context_shards(ranks: RankPool) -> None:
    (whole,) = ranks.run(1, statistics, parallel={})
    shards = ranks.run(4, statistics, parallel={"context": 4})
    assert set(whole[0]) == {"slot_share", "mean_decay", "write_strength"}
    assert whole[2]["slot_share"] == pytest.approx(1.0)  # the layer with window 0 reads slots only
    for number, layer in enumerate(whole):
        for name, value in layer.items():
            # Means over equal shards; fp32.
            assert sum(shard[number][name] for shard in shards) / 4 == pytest.approx(value, rel=1e-5), (number, name)
