"""Which library attends to wide and full windows: a table, and what is installed."""

import importlib.metadata
import sys
from types import ModuleType

import pytest
import torch

from nha_kernels.triton.libraries import choice as libraries
from nha_kernels.triton.libraries.choice import WindowCall, choose_library, library_pays, prefer_library
from tests.kernels.triton.libraries.stand_ins import cute_interface, flash_attn_interface

FULL = WindowCall(torch.bfloat16, 128, 8192, None, one_document=True, capability=(9, 0))
WIDE = FULL._replace(window=4096)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions by package, for the test to fill; their modules are stand-ins."""
    versions: dict[str, str] = {}

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    package = ModuleType("flash_attn")
    package.flash_attn_interface, package.cute = flash_attn_interface(), cute_interface()
    modules = {"flash_attn": package, "flash_attn.flash_attn_interface": package.flash_attn_interface}
    modules |= {"flash_attn.cute": package.cute, "flash_attn.cute.interface": package.cute.interface}
    for path, module in modules.items():
        monkeypatch.setitem(sys.modules, path, module)
    for adapter in ("flash_attn_2", "flash_attn_4"):
        monkeypatch.delitem(sys.modules, f"nha_kernels.triton.libraries.{adapter}", raising=False)
    monkeypatch.setattr(libraries.importlib.metadata, "version", version)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    libraries._refusal_of_package.cache_clear()
    libraries._missing_arguments_of_flash_attn_4.cache_clear()
    yield versions
    libraries._refusal_of_package.cache_clear()
    libraries._missing_arguments_of_flash_attn_4.cache_clear()


@pytest.mark.parametrize(
    ("call", "packages", "name"),
    [
        (FULL, {}, "cudnn"),
        (FULL._replace(one_document=False), {}, "torch-flash"),
        (FULL._replace(num_tokens=1), {}, "torch-flash"),
        (FULL._replace(head_dim=256), {}, "torch-flash"),
        (WIDE, {}, "torch-flash"),
        # The fastest that was measured on the device.
        (FULL, {"flash-attn": "2.8.3.post2"}, "cudnn"),
        (WIDE, {"flash-attn": "2.8.3.post2"}, "flash-attn"),
        (WIDE._replace(head_dim=256), {"flash-attn": "2.8.3.post2"}, "torch-flash"),  # not checked with such heads
        (WIDE, {"flash-attn": "2.8.3.post2", "flash-attn-4": "4.0.0b36"}, "flash-attn-4"),
        (FULL, {"flash-attn-4": "4.0.0b36"}, "flash-attn-4"),
        (FULL._replace(head_dim=256), {"flash-attn-4": "4.0.0b36"}, "torch-flash"),
        (FULL._replace(head_dim=80), {"flash-attn-4": "4.0.0b36"}, "cudnn"),
        # Nothing was measured there: the packages go before PyTorch's kernel, the newest that runs there first.
        (WIDE._replace(capability=(8, 0)), {}, "torch-flash"),
        (WIDE._replace(capability=(8, 0)), {"flash-attn": "2.8.3.post2", "flash-attn-4": "4.0.0b36"}, "flash-attn"),
        (WIDE._replace(capability=(10, 0)), {"flash-attn": "2.8.3.post2", "flash-attn-4": "4.0.0b36"}, "flash-attn-4"),
        (FULL._replace(capability=(10, 0)), {"flash-attn": "2.7.0"}, "flash-attn"),
    ],
)
def test_choice(call: WindowCall, packages: dict[str, str], name: str, installed: dict[str, str]) -> None:
    installed.update(packages)
    assert choose_library(call).name == name


@pytest.mark.parametrize(
    ("package", "version", "reason"),
    [
        ("flash-attn", "2.6.3", "version 2.6.3 is installed, supported are 2.7.0 and later before 3.0.0"),
        ("flash-attn", "3.0.0b1", "version 3.0.0b1 is installed"),
        ("flash-attn-4", "4.1.0", "version 4.1.0 is installed, supported are 4.0.0b36 and later before 4.1.0"),
        ("flash-attn-4", "4.0.0b9", "version 4.0.0b9 is installed"),
        ("flash-attn-4", "unknown", "version unknown is installed"),
    ],
)
def test_other_versions_are_passed_over(package: str, version: str, reason: str, installed: dict[str, str]) -> None:
    installed[package] = version
    choice = choose_library(WIDE._replace(capability=(10, 0)))
    assert choice.name == "torch-flash" and f"not {package}: {reason}" in choice.reason


def test_a_package_that_cannot_be_imported_is_passed_over(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed["flash-attn"] = "2.8.3"
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
    choice = choose_library(WIDE._replace(capability=(8, 0)))
    assert choice.name == "torch-flash" and "version 2.8.3 cannot be imported: ModuleNotFoundError" in choice.reason


def test_a_version_of_flash_attn_4_with_other_arguments_is_passed_over(installed: dict[str, str]) -> None:
    installed["flash-attn-4"] = "4.0.0b99"
    sys.modules["flash_attn.cute.interface"]._flash_attn_bwd = lambda q, k, v, out, dout: None
    choice = choose_library(WIDE._replace(capability=(10, 0)))
    assert choice.name == "torch-flash" and "its _flash_attn_bwd lacks causal, cu_seqlens_k" in choice.reason


def test_cudnn_gives_way_to_a_deterministic_backward(installed: dict[str, str]) -> None:
    before = torch.get_deterministic_debug_mode()  # the tests run in the mode that fills uninitialised memory
    torch.set_deterministic_debug_mode("error")
    try:
        choice = choose_library(FULL)
    finally:
        torch.set_deterministic_debug_mode(before)
    assert choice.name == "torch-flash" and "not cudnn: its backward is not deterministic" in choice.reason


def test_a_library_may_be_asked_for(installed: dict[str, str]) -> None:
    installed["flash-attn"] = "2.8.3"
    with prefer_library("flash-attn"):
        assert choose_library(WIDE) == ("flash-attn", "asked for")
    with prefer_library("cudnn"), pytest.raises(ValueError, match="'cudnn' was asked for, but it takes one document a row and no window"):
        choose_library(WIDE)
    with pytest.raises(ValueError, match="allowed are 'cudnn', 'torch-flash', 'flash-attn', 'flash-attn-4'"), prefer_library("flash"):
        pass


@pytest.mark.parametrize(("packages", "widest_fused"), [({}, 1023), ({"flash-attn-4": "4.0.0b36"}, 512)])
def test_windows_from_which_a_library_pays(packages: dict[str, str], widest_fused: int, installed: dict[str, str]) -> None:
    installed.update(packages)
    assert not library_pays(WIDE._replace(window=0)) and not library_pays(WIDE._replace(window=widest_fused))
    assert library_pays(WIDE._replace(window=widest_fused + 1)) and library_pays(FULL)
    with prefer_library("torch-flash"):  # who asks for a library does not get another way
        assert library_pays(WIDE._replace(window=64)) and not library_pays(WIDE._replace(window=0))
