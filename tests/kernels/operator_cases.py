"""Random inputs and comparisons shared by the operator's tests."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from nha_kernels import Memory, nha_attention

ROPE = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)  # rotary_dim 8 of K = 12: partial rotary


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.g

    def part(self, rows: slice) -> tuple[Tensor, ...]:
        return tuple(tensor[:, rows] for tensor in self.tensors)


def random_inputs(
    tokens: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2, slots: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Inputs:
    """K = 12, V = 8; gates spread over slow and fast decays."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z = 4 * normal(batch, tokens, kv_heads, slots)
    g = (F.logsigmoid(z) / 8).to(torch.float64 if dtype == torch.float64 else torch.float32)
    q, k, v = normal(batch, tokens, heads, 12), normal(batch, tokens, kv_heads, 12), normal(batch, tokens, kv_heads, 8)
    return Inputs(*(x.requires_grad_() for x in (q.to(dtype), k.to(dtype), v.to(dtype), g)))


def boundaries(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def relative_error(given: Tensor, wanted: Tensor) -> float:
    """Ratio of norms; of the difference alone where what is wanted is zero."""
    given, wanted = given.detach().double(), wanted.detach().double()
    difference, norm = (given - wanted).norm(), wanted.norm()
    return float(difference / norm if norm > 0 else difference)


def float_tensors(memory: Memory) -> dict[str, Tensor]:
    values = {field.name: getattr(memory, field.name) for field in fields(memory)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor) and value.is_floating_point()}


def align_window_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Window rows are aligned at the newest token; a backend may keep fewer rows that hold nothing."""
    rows = max(a.shape[1], b.shape[1])
    return tuple(torch.cat([x.new_zeros(x.shape[0], rows - x.shape[1], *x.shape[2:]), x], dim=1) for x in (a, b))


def assert_memories_equal(given: Memory, wanted: Memory, tolerance: float) -> None:
    assert given.window == wanted.window
    assert torch.equal(given.length, wanted.length)
    for (name, a), b in zip(float_tensors(given).items(), float_tensors(wanted).values(), strict=True):
        if name.startswith("window"):
            a, b = align_window_rows(a, b)
        assert relative_error(a, b) <= tolerance, f"memory.{name}: relative error {relative_error(a, b):.2e}"


def forward_and_gradients(inputs: Inputs, backend: str, seed: int = 1, **options: object) -> tuple[dict[str, Tensor], Memory]:
    """Output and gradients of a random function of the output AND of the returned memory, so both gradient paths count."""
    out, memory = nha_attention(*inputs.tensors, return_memory=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(seed)
    loss = (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
    for name, tensor in float_tensors(memory).items():
        if name.startswith("window"):  # depends on the row's distance from the newest token only, see align_window_rows
            age = torch.arange(tensor.shape[1], 0, -1, dtype=torch.float64)
            loss = loss + (tensor.double() * age.cos()[None, :, None, None]).sum()
        else:
            loss = loss + (tensor.double() * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(loss, inputs.tensors)
    return {"out": out, "dq": gradients[0], "dk": gradients[1], "dv": gradients[2], "dg": gradients[3]}, memory


def assert_same(inputs: Inputs, tolerance: float, **options: object) -> None:
    """The torch backend equals the oracle: output, gradients, memory."""
    wanted, wanted_memory = forward_and_gradients(inputs, "reference", **options)
    given, given_memory = forward_and_gradients(inputs, "torch", **options)
    for name, value in wanted.items():
        assert relative_error(given[name], value) <= tolerance, f"{name}: relative error {relative_error(given[name], value):.2e}"
    assert_memories_equal(given_memory, wanted_memory, tolerance)
