"""Cases of check.py for the kernels of `slot_summary`, against plain PyTorch in float64, forward and gradients."""

import dataclasses
from typing import Any

import torch
from compare import TOLERANCES, make_gates, relative_error
from torch import Tensor

from nha_kernels import slot_summary
from nha_kernels.slot_summary import summary_in_pytorch
from nha_kernels.triton.dispatch import refusal_of_summary

OUTPUT_TOLERANCE = 2e-5  # float32, and bf16 weights are kept in two parts


@dataclasses.dataclass(frozen=True)
class SummaryCase:
    dtype: str = "bfloat16"
    batch: int = 1
    tokens: int = 1000
    kv_heads: int = 2
    key_dim: int = 128
    value_dim: int = 128
    slots: int = 64
    gates: str = "usual"

    @property
    def name(self) -> str:
        changed = (f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return " ".join(["summary", *changed])


def summary_cases() -> list[SummaryCase]:
    return [
        SummaryCase(),
        SummaryCase(batch=3, tokens=31),
        SummaryCase(tokens=20001, gates="slow"),
        SummaryCase(tokens=70000, kv_heads=1, gates="mixed"),
        SummaryCase(gates="extreme"),
        SummaryCase(slots=16, key_dim=64, value_dim=64),
        SummaryCase(slots=48, key_dim=64, gates="mixed"),
        SummaryCase(slots=256, key_dim=256, value_dim=256),
        SummaryCase(dtype="float16", gates="mixed"),
        SummaryCase(dtype="float32", gates="mixed"),
        SummaryCase(dtype="float32", key_dim=256, value_dim=64, slots=128, gates="slow"),
    ]


def check_summary(case: SummaryCase, seed: int) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def piece(x: Tensor) -> Tensor:
        return x[:, 5:]  # as context parallelism cuts it: rows of the batch are not adjacent

    shape = (case.batch, case.tokens + 5, case.kv_heads)
    k, v = (torch.randn(*shape, dim, generator=generator, device="cuda").to(dtype) for dim in (case.key_dim, case.value_dim))
    inputs = [piece(x) for x in (k, v, make_gates(case.gates, (*shape, case.slots), generator))]
    reason = refusal_of_summary(*inputs)
    if reason is not None:
        return {"passed": True, "refused": reason}

    def run(function: Any, exact: bool) -> dict[str, Tensor]:
        leaves = [(x.double() if exact else x).detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        generator = torch.Generator("cuda").manual_seed(7)
        weights = [torch.randn(x.shape, generator=generator, device="cuda") for x in outputs]
        loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
        tensors = [*outputs, *torch.autograd.grad(loss, leaves)]
        names = ("log_decay", "update_keys", "update_values", "dk", "dv", "dg")
        return {name: x.detach() for name, x in zip(names, tensors, strict=True)}

    first, second, exact = run(slot_summary, False), run(slot_summary, False), run(summary_in_pytorch, True)
    deterministic = all(torch.equal(first[name], second[name]) for name in first)
    errors = {name: relative_error(first[name], exact[name]) for name in first}
    passed = all(error <= (TOLERANCES[dtype][1] if name in ("dk", "dv", "dg") else OUTPUT_TOLERANCE) for name, error in errors.items())
    return {"passed": passed and deterministic, "deterministic": deterministic, "errors": errors}
