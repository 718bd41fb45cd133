"""Every weight of a model by its layout-independent name: full shape, how it starts, whether it is decayed, whether it is split.

Of an attention module its layer kind says so, of the rest of a block this file. tests/model holds the table against the built model.
"""

from __future__ import annotations

import re
from dataclasses import replace

from nha_megatron.config.model import ModelConfig
from nha_megatron.layers.kind import Weight

_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def model_weights(model: ModelConfig) -> dict[str, Weight]:
    """The table of a whole model."""
    table = _outside_of_layers(model)
    for number in range(model.num_layers):
        table |= {f"decoder.layers.{number}.{name}": weight for name, weight in _of_layer(model, number).items()}
    return {name: replace(weight, name=name) for name, weight in table.items()}


def weight_named(model: ModelConfig, name: str) -> Weight:
    """One entry of the table."""
    match = _IN_LAYER.fullmatch(name)
    weight = _outside_of_layers(model)[name] if match is None else _of_layer(model, int(match[1]))[match[2]]
    return replace(weight, name=name)


def _of_layer(model: ModelConfig, number: int) -> dict[str, Weight]:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    layer = model.stack[number]
    attention = {f"self_attention.{weight.name}": weight for weight in layer.kind.weights(layer.options, model)}
    block = [
        _norm("input_layernorm.weight", hidden),
        _norm("pre_mlp_layernorm.weight", hidden),
        Weight("mlp.linear_fc1.weight", (2 * ffn, hidden)),
        Weight("mlp.linear_fc2.weight", (hidden, ffn), initial="residual"),
    ]
    return attention | {weight.name: weight for weight in block}


def _outside_of_layers(model: ModelConfig) -> dict[str, Weight]:
    vocabulary = (model.padded_vocab_size, model.hidden_size)
    table = [Weight("embedding.word_embeddings.weight", vocabulary), _norm("decoder.final_layernorm.weight", model.hidden_size)]
    if not model.tie_embeddings:
        table.append(Weight("output_layer.weight", vocabulary))
    return {weight.name: weight for weight in table}


def _norm(name: str, size: int) -> Weight:
    return Weight(name, (size,), initial="ones", decayed=False, sharded=False)
