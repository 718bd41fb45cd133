"""A chip is known by its whole name or not at all."""

import pytest
import torch

from nha_megatron.training.hardware import device_peak_flops, memory_high_water, peak_bf16_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
    ],
)
def test_known_chips(name: str, tflops: float) -> None:
    assert peak_bf16_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA A1000", "NVIDIA H1000", "Tesla T4", ""])
def test_a_name_that_only_looks_alike_is_not_known(name: str) -> None:
    assert peak_bf16_flops(name) is None


def test_a_cpu_has_no_rate_but_memory() -> None:
    assert device_peak_flops(torch.device("cpu")) is None
    assert memory_high_water(torch.device("cpu")) > 2**20  # a Python process with torch holds more than a MiB
