"""How a layer kind is written into an exported Hugging Face model: rows of the weight table, fields of the configuration, source.

A row joins one tensor of ours to one or several of theirs by a pair of inverse functions, so that export and import are the same table
read in two directions. Tensors are whole (TP 1, PP 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nha_megatron.config.model import ModelConfig
from nha_megatron.layers.kind import LayerKind

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


class HuggingFaceLayer(ABC):
    """What `LayerKind.hugging_face` gives. `o`: the options of a layer."""

    @abstractmethod
    def entries(self, ours: str, theirs: str, o: Any, model: ModelConfig) -> Iterator[Entry]:
        """Rows of one layer's attention, every weight of it.

        Args:
            ours: prefix of the attention module in the GPTModel, `decoder.layers.3.self_attention.`.
            theirs: its prefix in the exported model, `model.layers.3.self_attn.`.
        """

    @abstractmethod
    def to_fields(self, layers: Mapping[int, Any], model: ModelConfig) -> dict[str, Any]:
        """Fields of config.json that describe these layers (number -> options), under names that no other kind uses."""

    @abstractmethod
    def differences(self, theirs: Any, layers: Mapping[int, Any], model: ModelConfig) -> list[str]:
        """In what the configuration `theirs` of a directory describes other weights than these layers: what ours is, what theirs is."""

    @abstractmethod
    def attention_class(self) -> type[torch.nn.Module]:
        """The class in the modelling file; layers/modeling.py says how it is built and called."""

    @abstractmethod
    def sources(self) -> Sequence[tuple[str, Path]]:
        """(module name, file) of the source that is inlined, in the order of dependence; `attention_class` is defined in the last one.

        Imports from `nha_kernels` are replaced by that operator's source where it is among the sources under this name.
        """


def form_of(kind: LayerKind) -> HuggingFaceLayer:
    """The form of a kind that has one."""
    form = kind.hugging_face
    assert isinstance(form, HuggingFaceLayer), f"layer kind {kind.name} has no Hugging Face form"
    return form
