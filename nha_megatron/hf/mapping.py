"""Names and layouts of the weights: Megatron's GPTModel on one side, the Hugging Face model on the other.

A declarative table over full tensors (TP 1, PP 1). Each entry joins one tensor of ours to one or several of theirs by a pair of
inverse functions, so that export and import are the same table read in two directions. {i} is the layer.

    linear_qkv   rows grouped by KV head [q ... q k v | q ... q k v | ...]   <->  q_proj, k_proj, v_proj
    linear_fc1   rows [gate; up]                                             <->  gate_proj, up_proj
    vocabulary   rows padded to a multiple of 128                            <->  rows of the tokenizer alone
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nha_megatron.config import ConfigError, ModelConfig

Split = Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
Merge = Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


def split_same(tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    return (tensor,)


def merge_same(tensors: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    return tensors[0]


def split_qkv(tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """[H * (r + 2) * D, ...] -> [H * r * D, ...], [H * D, ...], [H * D, ...] with r query heads a KV head."""
    queries = model.num_heads // model.num_kv_heads
    grouped = tensor.unflatten(0, (model.num_kv_heads, queries + 2, model.head_dim))
    return tuple(part.flatten(0, 2) for part in grouped.split([queries, 1, 1], dim=1))


def merge_qkv(tensors: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    return torch.cat([part.unflatten(0, (model.num_kv_heads, -1, model.head_dim)) for part in tensors], dim=1).flatten(0, 2)


def split_gate_up(tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    return tensor.chunk(2, dim=0)


def merge_gate_up(tensors: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    return torch.cat(tensors)


def strip_vocabulary(tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    return (tensor[: model.vocab_size],)


def pad_vocabulary(tensors: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    """Padding rows are zero: no token has them."""
    (tensor,) = tensors
    return torch.cat([tensor, tensor.new_zeros(model.padded_vocab_size - tensor.shape[0], *tensor.shape[1:])])


@dataclass(frozen=True)
class Entry:
    """`ours` <-> `theirs`; `split` takes our tensor to theirs, `merge` is its inverse. `shape` is that of our full tensor."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    split: Split = split_same
    merge: Merge = merge_same


def entries(model: ModelConfig) -> list[Entry]:
    """The table of one model: every weight that it has, on both sides, and nothing else."""
    hidden, heads, kv_heads, dim = model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim
    vocabulary = (model.padded_vocab_size, hidden)
    qkv_rows = (heads + 2 * kv_heads) * dim
    table = [Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary, strip_vocabulary, pad_vocabulary)]
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        attention, self_attn = f"{ours}self_attention.", f"{theirs}self_attn."
        qkv = tuple(f"{self_attn}{name}_proj" for name in "qkv")
        gate_up = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
        table += [
            Entry(f"{ours}input_layernorm.weight", (f"{theirs}input_layernorm.weight",), (hidden,)),
            Entry(f"{attention}linear_qkv.weight", tuple(f"{name}.weight" for name in qkv), (qkv_rows, hidden), split_qkv, merge_qkv),
            Entry(f"{attention}linear_gate.weight", (f"{self_attn}g_proj.weight",), (kv_heads * model.num_slots, hidden)),
            Entry(f"{attention}linear_proj.weight", (f"{self_attn}o_proj.weight",), (hidden, heads * dim)),
            Entry(f"{ours}pre_mlp_layernorm.weight", (f"{theirs}post_attention_layernorm.weight",), (hidden,)),
            Entry(f"{ours}mlp.linear_fc1.weight", gate_up, (2 * model.ffn_hidden_size, hidden), split_gate_up, merge_gate_up),
            Entry(f"{ours}mlp.linear_fc2.weight", (f"{theirs}mlp.down_proj.weight",), (hidden, model.ffn_hidden_size)),
        ]
        if model.qkv_bias:
            table.append(Entry(f"{attention}linear_qkv.bias", tuple(f"{name}.bias" for name in qkv), (qkv_rows,), split_qkv, merge_qkv))
        if model.qk_norm == "rms":
            table.append(Entry(f"{attention}q_layernorm.weight", (f"{self_attn}q_norm.weight",), (dim,)))
            table.append(Entry(f"{attention}k_layernorm.weight", (f"{self_attn}k_norm.weight",), (dim,)))
        if model.output_norm == "rms":
            table.append(Entry(f"{attention}output_norm.weight", (f"{self_attn}o_norm.weight",), (heads * dim,)))
    table.append(Entry("decoder.final_layernorm.weight", ("model.norm.weight",), (hidden,)))
    if not model.tie_embeddings:
        table.append(Entry("output_layer.weight", ("lm_head.weight",), vocabulary, strip_vocabulary, pad_vocabulary))
    return table


def to_hf(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Full tensors by GPTModel name -> tensors by Hugging Face name. Views where the layout allows.

    Raises:
        ConfigError: a weight is missing, left over, or has another shape than the configuration says.
    """
    table = entries(model)
    _check_names(weights.keys(), {entry.ours for entry in table}, "the checkpoint")
    result: dict[str, Tensor] = {}
    for entry in table:
        tensor = weights[entry.ours]
        _check_shape(entry.ours, tensor, entry.shape)
        result.update(zip(entry.theirs, entry.split(tensor, model), strict=True))
    return result


def from_hf(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Inverse of `to_hf`; rows of the vocabulary padding are zero. Same errors."""
    table = entries(model)
    _check_names(weights.keys(), {name for entry in table for name in entry.theirs}, "the Hugging Face directory")
    result: dict[str, Tensor] = {}
    for entry in table:
        for name, part in zip(entry.theirs, entry.split(torch.empty(entry.shape, device="meta"), model), strict=True):
            _check_shape(name, weights[name], tuple(part.shape))
        result[entry.ours] = entry.merge(tuple(weights[name] for name in entry.theirs), model)
    return result


def _check_names(given: Iterable[str], wanted: set[str], source: str) -> None:
    names = set(given)
    for difference, what in ((wanted - names, "lacks"), (names - wanted, "has, beyond what the configuration describes,")):
        if difference:
            some = ", ".join(sorted(difference)[:4]) + (" ..." if len(difference) > 4 else "")
            raise ConfigError(f"{source} {what} {len(difference)} weight(s): {some}. Use the configuration that the weights were made with")


def _check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise ConfigError(
            f"weight {name} has shape {tuple(tensor.shape)}, the configuration says {wanted}. "
            "Use the configuration that the weights were made with"
        )
