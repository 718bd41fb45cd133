"""Which library attends to a full or wide window: one static choice, from the device and what is installed. Needs no GPU and no triton.

    cudnn         cuDNN's attention through PyTorch: full windows, one document in each row
    torch-flash   the flash kernel that PyTorch comes with
    flash-attn    the package flash-attn 2.x
    flash-attn-4  the package flash-attn-4, for compute capability 9.0 and newer

The fastest that was measured on a device comes first (its file in architectures/ has the order); one that was not measured there comes
after all that were. Where nothing was measured, the packages come before PyTorch's own kernel.
"""

import functools
import importlib
import importlib.metadata
import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..architectures import Capability, architecture_of, capability_of, checked_architecture

_NEWEST_FIRST = ("flash-attn-4", "flash-attn", "torch-flash", "cudnn")
_MODULES = {"cudnn": "cudnn", "torch-flash": "torch_flash", "flash-attn": "flash_attn_2", "flash-attn-4": "flash_attn_4"}
_FLASH_ATTN_VERSIONS = ("2.7.0", "3.0.0")  # from, up to: the entry points of 2.6 and of 3 take other arguments
_FLASH_ATTN_4_VERSIONS = ("4.0.0b36", "4.1.0")  # from the one that was checked on
_CHECKED_HEAD_DIMS = (64, 96, 128)  # of both packages

_preferred: ContextVar[str | None] = ContextVar("preferred attention library", default=None)


class WindowCall(NamedTuple):
    """What the choice depends on."""

    dtype: torch.dtype
    head_dim: int  # K = V
    num_tokens: int
    window: int | None
    one_document: bool  # neither documents nor a memory: every row of the batch is one document
    capability: Capability | None  # None: no CUDA device (the interpreter of triton)


class Choice(NamedTuple):
    name: str
    reason: str


def window_call(q: Tensor, window: int | None, *, one_document: bool) -> WindowCall:
    return WindowCall(q.dtype, q.shape[3], q.shape[1], window, one_document, capability_of(q.device))


@contextmanager
def prefer_library(name: str | None) -> Iterator[None]:
    """Inside, full windows and all others that libraries serve (16 bits, K = V) take this one or fail with the reason: for the checks and
    benchmarks that compare libraries."""
    if name is not None and name not in _MODULES:
        raise ValueError(f"attention library {name!r}: allowed are {', '.join(map(repr, _MODULES))}")
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def choose_library(call: WindowCall) -> Choice:
    """The library of a call that dispatch lets pass, and why. PyTorch's flash kernel takes all of those."""
    preferred = _preferred.get()
    if preferred is not None:
        reason = _REFUSALS[preferred](call)
        if reason is not None:
            raise ValueError(f"attention library {preferred!r} was asked for, but {reason}")
        return Choice(preferred, "asked for")
    measured = _measured(call)
    passed_over: list[str] = []
    for name in (*measured, *(name for name in _NEWEST_FIRST if name not in measured)):
        reason = _REFUSALS[name](call)
        if reason is None:
            why = "the fastest measured on this device" if name in measured else "none was measured on this device"
            return Choice(name, "; ".join([why, *passed_over]))
        passed_over.append(f"not {name}: {reason}")
    raise AssertionError(passed_over)


def library_pays(call: WindowCall) -> bool:
    """Whether the library that `choose_library` takes attends faster than the fused kernels do, or was asked for."""
    if call.window is None:
        return True
    if _preferred.get() is not None:
        return call.window > 0  # no library takes a window without tokens
    pays_above = architecture_of(call.capability).LIBRARY_PAYS_ABOVE
    return call.window > min(pays_above.values()) and call.window > pays_above[choose_library(call).name]


def _measured(call: WindowCall) -> tuple[str, ...]:
    architecture = checked_architecture(call.capability)
    if architecture is None:
        return ()
    full = call.window is None and call.one_document
    return architecture.FULL_WINDOW_LIBRARIES if full else architecture.OTHER_WINDOW_LIBRARIES


def load_library(name: str) -> ModuleType:
    """A module with `forward` and `backward` as torch_flash.py has them."""
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def _refusal_of_cudnn(call: WindowCall) -> str | None:
    if call.window is not None or not call.one_document:
        return "it takes one document a row and no window here"
    if call.capability is None or call.capability < (9, 0):
        return "it was tried on compute capability 9.0 only"
    if call.head_dim > 128:
        return f"its backward takes heads of at most 128 channels, given {call.head_dim}"
    if call.num_tokens < 2:
        return "it takes no single token"
    if not torch.backends.cudnn.is_available() or not torch.backends.cuda.cudnn_sdp_enabled():
        return "PyTorch has it switched off"
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "its backward is not deterministic"
    return None


def _refusal_of_torch_flash(call: WindowCall) -> str | None:
    return None


def _refusal_of_flash_attn(call: WindowCall) -> str | None:
    if call.capability is None or call.capability < (8, 0):
        return "it runs on compute capability 8.0 and newer"
    if call.head_dim not in _CHECKED_HEAD_DIMS:
        return f"it was checked with heads of 64, 96 and 128 channels, given {call.head_dim}"
    return _refusal_of_package("flash-attn", _FLASH_ATTN_VERSIONS, "flash_attn.flash_attn_interface")


def _refusal_of_flash_attn_4(call: WindowCall) -> str | None:
    if call.capability is None or call.capability < (9, 0):
        return "its backward runs on compute capability 9.0 and newer"
    if call.capability >= (12, 0):
        return "on compute capability 12 its backward is not deterministic when asked to be"
    if call.head_dim not in _CHECKED_HEAD_DIMS:
        return f"it was checked with heads of 64, 96 and 128 channels, given {call.head_dim}"
    reason = _refusal_of_package("flash-attn-4", _FLASH_ATTN_4_VERSIONS, "flash_attn.cute.interface")
    return reason or _missing_arguments_of_flash_attn_4()


@functools.cache
def _refusal_of_package(package: str, versions: tuple[str, str], module: str) -> str | None:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "it is not installed"
    least, bound = versions
    if not _release(least) <= _release(version) or _release(version)[:3] >= _release(bound)[:3]:  # a beta of the bound is not below it
        return f"version {version} is installed, supported are {least} and later before {bound}"
    try:
        importlib.import_module(module)
    except Exception as error:  # built for another torch or against another version of what it needs: anything can come out of it
        return f"version {version} cannot be imported: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return None


@functools.cache
def _missing_arguments_of_flash_attn_4() -> str | None:
    adapter = load_library("flash-attn-4")
    for function, wanted in (("_flash_attn_fwd", adapter.FORWARD_ARGUMENTS), ("_flash_attn_bwd", adapter.BACKWARD_ARGUMENTS)):
        entry = getattr(adapter.interface, function, None)
        missing = sorted(wanted - set(inspect.signature(entry).parameters)) if callable(entry) else ["the function"]
        if missing:
            return f"its {function} lacks {', '.join(missing)}"
    return None


def _release(version: str) -> tuple[float, ...]:
    """Major, minor, micro and number of the beta, for comparing; nothing is below it where the version has no such form."""
    parts = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:b(\d+))?", version)
    if parts is None:
        return ()
    *release, beta = parts.groups()
    return (*(int(part or 0) for part in release), math.inf if beta is None else int(beta))


_REFUSALS: dict[str, Callable[[WindowCall], str | None]] = {
    "cudnn": _refusal_of_cudnn,
    "torch-flash": _refusal_of_torch_flash,
    "flash-attn": _refusal_of_flash_attn,
    "flash-attn-4": _refusal_of_flash_attn_4,
}
