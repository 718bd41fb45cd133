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

if TYPE_CHECKING:
    from nha_megatron.config.model import ModelConfig

_SCALED_DOWN = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def initialize_weights(chunks: Sequence[nn.Module], model: ModelConfig, seed: int, tp_rank: int, tp_size: int) -> None:
    """Fills all parameters: matrices normal(0, init_std), those that write to the residual stream smaller by sqrt(2 num_layers),
    norms one, biases and the rows of the padded vocabulary zero."""
    for name, parameter in global_parameters(chunks):
        parameter.copy_(initial_shard(name, parameter, model, seed, tp_rank, tp_size, parameter.device))


def initial_shard(
    name: str, parameter: nn.Parameter, model: ModelConfig, seed: int, tp_rank: int, tp_size: int, device: torch.device
) -> Tensor:
    """What `parameter` starts as on a TP rank, in fp32, drawn on `device`. `name` is its layout-independent name."""
    return shard_of(_draw(name, full_shape(parameter, tp_size), model, seed, device), parameter, tp_rank, tp_size)


def _draw(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int, device: torch.device) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape, device=device)
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    std = model.init_std
    if name.endswith(_SCALED_DOWN):
        std /= math.sqrt(2 * model.num_layers)
    generator = torch.Generator(device).manual_seed(parameter_seed(seed, name))
    full = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(std)
    if name in _VOCABULARY:
        full[model.vocab_size :] = 0.0
    return full


def parameter_seed(seed: int, name: str) -> int:
    """63-bit seed of one parameter, stable across Python versions and machines."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
