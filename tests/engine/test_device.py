"""Device choice, and the CPU workarounds being where they belong."""

from __future__ import annotations

import pytest
import torch

from nha_megatron.config import ConfigError
from nha_megatron.engine import cpu_workarounds
from nha_megatron.engine.device import backend_for, choose_device
from tests.distributed import RankPool


@pytest.mark.parametrize(
    ("requested", "devices", "chosen"), [("auto", 0, "cpu"), ("auto", 2, "cuda:1"), ("cpu", 2, "cpu"), ("cuda", 2, "cuda:1")]
)
def test_device_of_the_second_process(monkeypatch: pytest.MonkeyPatch, requested: str, devices: int, chosen: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(requested) == torch.device(chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_more_processes_than_devices_is_refused(monkeypatch: pytest.MonkeyPatch, requested: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"process 2 of its host.* shows 2 CUDA.*training\.device=cpu"):
        choose_device(requested, local_rank=2)  # type: ignore[arg-type]


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="shows 0 CUDA"):
        choose_device("cuda", local_rank=0)


def test_backend_follows_the_device() -> None:
    assert backend_for(torch.device("cpu")) == "gloo"
    assert backend_for(torch.device("cuda", 3)) == "nccl"


def test_workarounds_are_for_the_cpu_only() -> None:
    assert cpu_workarounds.needed(torch.device("cpu"))
    assert not cpu_workarounds.needed(torch.device("cuda", 0))


def test_workarounds_stay_out_on_cuda() -> None:
    """This process never enters them (only the pool's ranks do), so a leak would show."""
    assert not cpu_workarounds.active()
    before = (torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.get_rng_state)
    cpu_workarounds.enter(torch.device("cuda", 0))
    assert not cpu_workarounds.active()
    assert (torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.get_rng_state) == before
    assert torch.ones(1).type() == "torch.FloatTensor"


def use_workarounds_twice() -> dict[str, object]:
    cpu_workarounds.enter(torch.device("cpu"))
    modes = torch.overrides._get_current_function_mode_stack()
    cpu_workarounds.enter(torch.device("cpu"))
    x = torch.ones(2)
    return {
        "entered once": len(torch.overrides._get_current_function_mode_stack()) == len(modes) and cpu_workarounds.active(),
        "cur": torch.empty(1, device=torch.cuda.current_device()).device.type,
        "literal": {torch.zeros(1, device="cuda").device.type, x.to("cuda:0").device.type, x.cuda().device.type},
        "pinned": torch.zeros(1, pin_memory=True).is_pinned(),
        "type": (x.type(), x.bfloat16().type(), torch.ones(1, dtype=torch.int64).type()),
        "sync": (torch.cuda.synchronize(), torch.cuda.current_stream()),
        "cpu untouched": x.to(torch.float64).dtype,
    }


def test_workarounds_make_cuda_mean_cpu(ranks: RankPool) -> None:
    assert ranks.run(1, use_workarounds_twice) == [
        {
            "entered once": True,
            "cur": "cpu",
            "literal": {"cpu"},
            "pinned": False,
            "type": ("torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.LongTensor"),
            "sync": (None, None),
            "cpu untouched": torch.float64,
        }
    ]
