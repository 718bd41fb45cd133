"""Megatron's gated MLP with an activation that keeps little for the backward.

Megatron's own, without its compiled form, keeps [gate | up], SiLU of the gate, a copy of `up` and the product: ten bytes a channel in
bfloat16 where six do. That is the largest part of what a layer keeps, and so of what limits the context on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class GatedMLP(MLP):
    """linear_fc2(SiLU(gate) * up) with [gate | up] = linear_fc1(x); no biases. Weights and their names are Megatron's."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """[s, b, h] -> ([s, b, h], None), both s / tp under sequence parallelism."""
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 F] -> SiLU(gate) * up [..., F]. Keeps its input alone, and computes SiLU again in the backward."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        if torch.is_grad_enabled():  # create_graph=True: only operations that can be differentiated again
            s = torch.sigmoid(gate)
            return torch.cat([d_out * up * s * (1 + gate * (1 - s)), d_out * gate * s], dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(d_out, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_out * up, gate, grad_input=d_gate)
        return d_gate_up
