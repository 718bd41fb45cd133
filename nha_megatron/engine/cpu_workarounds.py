"""Megatron-core on a CPU: five workarounds for its assumptions that there is a CUDA device.

Megatron-core has no CPU path, but most of its code does not care where tensors are. What does care is listed here
by the lines that need it (megatron-core 0.16.1); 0.19.2 has the same statements on other lines. `enter` puts
the workarounds in place once per process, and only when the device of the run is the CPU: on CUDA nothing here runs.

| name    | what it does                                                          | needed by, for example                       |
|---------|-----------------------------------------------------------------------|----------------------------------------------|
| cur     | `torch.cuda.current_device()` is the CPU                              | `param_and_grad_buffer.py:806`, 110 more     |
| sync    | `torch.cuda.synchronize`, `empty_cache`, `current_stream` do nothing  | `p2p_communication.py:242`                   |
| literal | `device="cuda"`, `.to("cuda")`, `.cuda()`, `pin_memory=True` mean CPU | `schedules.py:596`, `clip_grads.py:90`       |
| type    | `Tensor.type()` of a float tensor says `torch.cuda.*`                 | `distrib_optimizer.py:361`                   |
| rng     | the CUDA generator state is the CPU generator state                   | `tensor_parallel/random.py:55` (recompute)   |

`literal` and `type` are one `TorchFunctionMode`. It is entered per thread; CPU autograd runs in the calling thread,
so backward and recomputation are covered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_mode: _CudaMeansCpu | None = None


def needed(device: torch.device) -> bool:
    """Whether a run on `device` needs the workarounds: on the CPU, also on a host that has CUDA devices."""
    return device.type == "cpu"


def active() -> bool:
    """Whether the workarounds are in place in this process."""
    return _mode is not None


def enter(device: torch.device) -> None:
    """Puts the workarounds in place if a run on `device` needs them. Calling it again changes nothing."""
    global _mode
    if not needed(device) or active():
        return
    # cur. A device object works wherever Megatron passes the index on as `device=`.
    torch.cuda.current_device = lambda: _CPU
    # sync
    torch.cuda.synchronize = _nothing
    torch.cuda.empty_cache = _nothing
    torch.cuda.current_stream = _nothing
    _use_cpu_generator_state()
    # literal, type
    _mode = _CudaMeansCpu()
    _mode.__enter__()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _use_cpu_generator_state() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    torch.cuda.get_rng_state = get_state
    torch.cuda.manual_seed = torch.manual_seed
    # The tracker warns when the CPU state moves inside a CUDA generator context. Here they are the same generator.
    logging.getLogger(megatron_random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _names_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.split(":")[0] == "cuda") or (isinstance(value, torch.device) and value.type == "cuda")


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs and args[0].is_floating_point():
            return function(*args).replace("torch.", "torch.cuda.")
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if function is torch.Tensor.to:
            args = tuple(_CPU if _names_cuda(argument) else argument for argument in args)
        return function(*args, **kwargs)
