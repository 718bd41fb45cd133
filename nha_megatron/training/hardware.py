"""Peak matmul rates of known accelerators, for model FLOP utilisation (MFU).

Dense bf16 rates from the vendors' data sheets, without structured sparsity. A chip that is not listed has no MFU: a
wrong denominator is worse than none.
"""

from __future__ import annotations

import psutil
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


def memory_in_use(device: torch.device) -> int:
    """Bytes of this rank: the most allocated so far on CUDA, the resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
