"""A family's table of weights, read in two directions.

linear_qkv   rows grouped by KV head [q ... q k v | q ... q k v | ...]   <->  q_proj, k_proj, v_proj
linear_fc1   rows [gate; up]                                             <->  gate_proj, up_proj
vocabulary   rows padded to a multiple of 128                            <->  rows of the tokenizer alone
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nha_megatron.config import ConfigError, ModelConfig
from nha_megatron.layers.hugging_face import Entry


def to_hf(weights: Mapping[str, Tensor], table: Sequence[Entry], model: ModelConfig) -> dict[str, Tensor]:
    """Full tensors by GPTModel name -> tensors by Hugging Face name. Views where the layout allows.

    Raises:
        ConfigError: a weight is missing, left over, or has another shape than the configuration says.
    """
    _check_names(weights.keys(), {entry.ours for entry in table}, "the checkpoint")
    result: dict[str, Tensor] = {}
    for entry in table:
        tensor = weights[entry.ours]
        _check_shape(entry.ours, tensor, entry.shape)
        result.update(zip(entry.theirs, entry.split(tensor, model), strict=True))
    return result


def from_hf(weights: Mapping[str, Tensor], table: Sequence[Entry], model: ModelConfig) -> dict[str, Tensor]:
    """Inverse of `to_hf`; rows of the vocabulary padding are zero. Same errors."""
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
