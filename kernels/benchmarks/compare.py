"""What checks and benchmarks share: tolerances, how an error is measured, gates of several kinds, and that they need a GPU."""

import sys

import torch
from torch import Tensor

TOLERANCES = {  # relative L2 error of outputs and of gradients
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (5e-3, 1e-2),
    torch.float16: (5e-3, 1e-2),
}


def require_cuda_device() -> None:
    """Ends the program with one sentence and exit status 2 where there is none."""
    if not torch.cuda.is_available():
        print("no CUDA device was found: the kernels run on a GPU only, so start this on a machine that has one", file=sys.stderr)
        sys.exit(2)


def relative_error(value: Tensor, exact: Tensor) -> float:
    if not torch.isfinite(value).all():
        return float("nan")
    norm = exact.norm().item()
    error = (value.double() - exact).norm().item()
    return error / norm if norm > 1e-12 else error


def make_gates(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Log-gates in float32. `kind`: usual | slow | extreme (all forget at once) | mixed (beside slots that keep everything)."""
    logits = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64)
    scale = {"usual": 1.0, "slow": 1.0, "extreme": 40.0, "mixed": 1.0}[kind]
    g = torch.nn.functional.logsigmoid(2 * logits + (8.0 if kind == "slow" else 0.0)) / 8 * scale
    if kind == "mixed":
        chosen = torch.rand(g.shape, generator=generator, device="cuda")
        g = torch.where(chosen < 0.1, -60.0, torch.where(chosen > 0.8, -1e-9, g))
    return g.float()
