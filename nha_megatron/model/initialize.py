"""Initial weights that do not depend on the layout.

Every parameter is drawn in full, in fp32, from a generator seeded by (seed, its global name), and then sliced. So the same seed gives the
same model on any grid of ranks (on the same kind of device: CPU and CUDA generators differ).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nha_megatron.model.parameters import full_shape, global_parameters, shard_of
from nha_megatron.model.weights import weight_named

if TYPE_CHECKING:
    from nha_megatron.config.model import ModelConfig
    from nha_megatron.layers.kind import Weight

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def initialize_weights(chunks: Sequence[nn.Module], model: ModelConfig, seed: int, tp_rank: int, tp_size: int) -> None:
    """Fills all parameters as the table of weights says (model/weights.py); rows of the padded vocabulary are zero."""
    for name, parameter in global_parameters(chunks):
        parameter.copy_(initial_shard(name, parameter, model, seed, tp_rank, tp_size, parameter.device))


def initial_shard(
    name: str, parameter: nn.Parameter, model: ModelConfig, seed: int, tp_rank: int, tp_size: int, device: torch.device
) -> Tensor:
    """What `parameter` starts as on a TP rank, in fp32, drawn on `device`. `name` is its layout-independent name."""
    weight = weight_named(model, name)
    assert full_shape(parameter, tp_size) == weight.shape, (name, full_shape(parameter, tp_size), weight.shape)
    return shard_of(_draw(weight, model, seed, device), parameter, tp_rank, tp_size)


def _draw(weight: Weight, model: ModelConfig, seed: int, device: torch.device) -> Tensor:
    if weight.initial == "zeros":
        return torch.zeros(weight.shape, device=device)
    if weight.initial == "ones":
        return torch.ones(weight.shape, device=device)
    generator = torch.Generator(device).manual_seed(parameter_seed(seed, weight.name))
    if callable(weight.initial):
        return weight.initial(weight.shape, generator)
    std = model.init_std / (math.sqrt(2 * model.num_layers) if weight.initial == "residual" else 1)
    full = torch.randn(weight.shape, generator=generator, device=device, dtype=torch.float32).mul_(std)
    if weight.name in _VOCABULARY:
        full[model.vocab_size :] = 0.0
    return full


def parameter_seed(seed: int, name: str) -> int:
    """63-bit seed of one parameter, stable across Python versions and machines."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
