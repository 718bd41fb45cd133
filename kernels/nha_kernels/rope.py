"""Rotary position embedding of the window part. Only distances matter, so positions may start anywhere."""

import torch
from torch import Tensor


def rope_tables(positions: Tensor, inverse_frequencies: Tensor, attention_factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [len(positions), rotary_dim / 2].

    Angles are formed in float64: in float32 they are off by 0.03 rad at a million tokens.
    """
    angles = positions.double()[:, None] * inverse_frequencies.double()[None, :]
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `rotary_dim` channels of x [B, T, H, K]; channel i pairs with i + rotary_dim / 2 (the Llama convention).

    Args:
        cos, sin: [T, rotary_dim / 2].

    Returns:
        Tensor of x's shape in the tables' dtype.
    """
    half = cos.shape[-1]
    x = x.to(cos.dtype)
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second, untouched = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, untouched], dim=-1)
