"""What a run or a measurement was made with: for reports that are read on another day, or beside those of another machine."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from nha_megatron.cluster.snapshot import revision


def installed_versions() -> dict[str, str]:
    """Of this process: Python, the libraries that compute, and on CUDA its device."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("megatron-core", "triton", "nha-megatron"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["device"] = torch.cuda.get_device_name()
    return found


def measurement_facts(device: torch.device, command: Sequence[str], commit: str | None = None) -> dict[str, Any]:
    """What a reader of measured times needs. `commit`: of the code, where it cannot be asked, such as a copy without git."""
    cuda = device.type == "cuda"
    return installed_versions() | {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "device_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "commit": commit or revision(),
        "command": shlex.join(command),
    }
