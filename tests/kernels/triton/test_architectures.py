"""A new GPU is a new file: dispatch, libraries and launches ask the list of architectures and nothing else."""

import dataclasses
from types import ModuleType

import pytest
import torch

from nha_kernels.triton import architectures, dispatch
from nha_kernels.triton.architectures import architecture_of, checked_architecture, sm90
from nha_kernels.triton.libraries.choice import _MODULES, WindowCall, choose_library, library_pays

pytest.importorskip("triton", reason="triton is not installed: nothing is dispatched to it")

WIDE = WindowCall(torch.bfloat16, 256, 8192, 300, one_document=False, capability=(10, 0))  # heads that no package was checked with


def call() -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.zeros(1, 4, heads, 128, dtype=torch.bfloat16) for heads in (8, 2, 2))
    return q, k, v, torch.zeros(1, 4, 2, 64)


@pytest.fixture
def on_a_new_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """10.0 where 9.0 alone has a file, whatever files there are."""
    monkeypatch.setattr(architectures, "ARCHITECTURES", (sm90,))
    monkeypatch.setattr(dispatch, "capability_of", lambda device: (10, 0))


@pytest.fixture
def sm100(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What a copy of sm90.py would be, with other tiles."""
    new = ModuleType("sm100")
    vars(new).update({name: value for name, value in vars(sm90).items() if not name.startswith("__")})
    new.CAPABILITIES, new.FULL_WINDOW_LIBRARIES, new.OTHER_WINDOW_LIBRARIES = ((10, 0),), (), ("torch-flash",)
    new.LIBRARY_PAYS_ABOVE = dict.fromkeys(_MODULES, 200)
    new.largest_group = lambda q, v: 2
    new.attention_tiles = lambda *call: dataclasses.replace(sm90.attention_tiles(*call), forward_warps=2)
    monkeypatch.setattr(architectures, "ARCHITECTURES", (sm90, new))
    return new


def test_a_gpu_that_was_not_checked_takes_pytorch(on_a_new_gpu: None) -> None:
    explanation = dispatch.explain_dispatch(*call(), window=64)
    assert explanation == "torch: the kernels have been checked on compute capability 9.0 only, this device has 10.0"
    assert checked_architecture((10, 0)) is None and not library_pays(WIDE)


def test_a_file_in_the_list_is_all_that_it_takes(on_a_new_gpu: None, sm100: ModuleType) -> None:
    assert architecture_of((10, 0)) is sm100 and architecture_of((9, 0)) is sm90
    explanation = dispatch.explain_dispatch(*call(), window=64)
    assert explanation.startswith("triton: fused, 2 parts of the 4 query heads to a KV head") and "forward_warps=2" in explanation
    assert library_pays(WIDE) and choose_library(WIDE).reason.startswith("the fastest measured on this device")
    assert architectures.checked_capabilities() == "9.0, 10.0"


def test_without_a_gpu_the_first_of_the_list_is_taken() -> None:
    """For the interpreter of triton and for kernels that are compiled without a GPU."""
    assert architecture_of(None) is sm90 and dispatch.choose_tiles(*call(), 64) == sm90.attention_tiles(*call(), 64)


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES, ids=lambda architecture: architecture.__name__.split(".")[-1])
def test_every_library_has_a_width_from_which_it_pays(architecture: ModuleType) -> None:
    assert set(architecture.LIBRARY_PAYS_ABOVE) == set(_MODULES)
    assert set(architecture.FULL_WINDOW_LIBRARIES) | set(architecture.OTHER_WINDOW_LIBRARIES) <= set(_MODULES)
