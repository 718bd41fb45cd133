"""Times full and wide windows with each library that is installed, and with the fused kernels: what the order of
libraries in nha_kernels/triton/architectures/, and what pays beside the fused kernels, are made from.

    PYTHONPATH=kernels python kernels/benchmarks/bench_wide.py [--output kernels/benchmarks/results] [--libraries cudnn,torch-flash]

HQ 32, H 8, D 128, M 64, bf16, B 1, milliseconds forward / forward and backward of the whole operator (rotation, window, slots, merge),
medians between device events, CUDA graphs where a library can be captured. Outputs are first compared with PyTorch's flash kernel.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import pathlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from bench import graphed, median_ms
from compare import require_cuda_device
from torch import Tensor
from torch.nn.functional import logsigmoid

from nha_kernels import nha_attention
from nha_kernels.triton.attention import backend
from nha_kernels.triton.libraries.choice import prefer_library

QUERY_HEADS, KV_HEADS, DIM, SLOTS = 32, 8, 128, 64
SHAPES: list[tuple[int | None, int, int]] = [  # window, tokens, documents
    (128, 8192, 1),
    (256, 8192, 1),
    (512, 8192, 1),
    (768, 8192, 1),
    (1024, 8192, 1),
    (None, 8192, 1),
    (None, 32768, 1),
    (None, 32768, 8),
    (4096, 32768, 1),
]


def call_of(window: int | None, tokens: int, documents: int) -> tuple[Any, list[Tensor], Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, DIM, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()

    g = logsigmoid(torch.randn(1, tokens, KV_HEADS, SLOTS, generator=generator, device="cuda")) / 8
    leaves = [normal(QUERY_HEADS), normal(KV_HEADS), normal(KV_HEADS), g.requires_grad_()]
    rope = 10000.0 ** (-torch.arange(0, DIM, 2, device="cuda").double() / DIM)
    boundaries = torch.linspace(0, tokens, documents + 1, device="cuda").to(torch.int32) if documents > 1 else None
    function = functools.partial(nha_attention, window=window, rope=rope, cu_seqlens=boundaries, backend="triton")
    return function, leaves, normal(QUERY_HEADS).detach()


@contextlib.contextmanager
def attending(name: str) -> Iterator[None]:
    """Windows of any width by this library, or by the fused kernels."""
    fused = mock.patch.object(backend, "attends_by_library", return_value=False)
    with fused if name == "fused" else prefer_library(name):
        yield


def measure(name: str, shape: tuple[int | None, int, int]) -> dict[str, Any]:
    function, leaves, gradient = call_of(*shape)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, gradient)

    with attending("torch-flash"):
        exact = forward(), *both()
    with attending(name):
        given = forward(), *both()
        errors = [((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-9)).item() for x, y in zip(given, exact, strict=True)]
        del given, exact
        row = {"window": shape[0], "tokens": shape[1], "documents": shape[2], "library": name, "error": max(errors)}
        row |= {"forward_eager": median_ms(forward, 150.0), "both_eager": median_ms(both, 200.0)}
        try:
            row |= {"forward_graph": median_ms(graphed(forward), 150.0), "both_graph": median_ms(graphed(both), 200.0)}
        except RuntimeError as error:
            row["no_graph"] = str(error).splitlines()[0]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--libraries", default="fused,cudnn,torch-flash,flash-attn,flash-attn-4")
    arguments = parser.parse_args()
    require_cuda_device()
    rows = []
    for shape in SHAPES:
        for name in arguments.libraries.split(","):
            if name == "fused" and shape[0] is None:
                continue
            try:
                row = measure(name, shape)
            except ValueError as error:  # the library does not take the call, or is not installed
                print(f"W {shape[0]} T {shape[1]} documents {shape[2]} {name}: {error}", flush=True)
                continue
            rows.append(row)
            times = [f"{kind} {row[kind]:.3f}" for kind in ("forward_graph", "both_graph", "forward_eager", "both_eager") if kind in row]
            print(f"W {shape[0]} T {shape[1]} documents {shape[2]} {name}: {' '.join(times)} error {row['error']:.1e}", flush=True)
            torch.cuda.empty_cache()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    for package in ("flash-attn", "flash-attn-4"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"wide_{device.lower().replace(' ', '_')}.json"
    path.write_text(json.dumps({"device": device, **versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
