"""Peak matmul rates of known accelerators, for model FLOP utilisation (MFU).

Dense bf16 rates from the vendors' data sheets, without structured sparsity. A chip that is not listed has no MFU: a
wrong denominator is worse than none.
"""

from __future__ import annotations

import resource
import sys

import torch

# Whole words of the device name, the more specific entry first ("H100" alone is the SXM module).
_PEAK_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.05),
    ("A40", 149.7),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
)


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the named device (as `torch.cuda.get_device_name` writes it), or None when it is not known."""
    words = f" {device_name.replace('-', ' ').replace('_', ' ')} "
    for name, tflops in _PEAK_BF16_TFLOPS:
        if f" {name} " in words:
            return tflops * 1e12
    return None


def device_peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, or None: a CPU, or a chip that is not in the table."""
    return peak_bf16_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def why_no_mfu(device: torch.device) -> str | None:
    """A line for the user when the accelerator has no entry in the table."""
    if device.type != "cuda" or device_peak_flops(device) is not None:
        return None
    return f"no MFU: the dense bf16 rate of {torch.cuda.get_device_name(device)!r} is not in nha_megatron/training/hardware.py"


def memory_high_water(device: torch.device) -> int:
    """The most bytes that this rank has had at once: by PyTorch's allocator on CUDA, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
