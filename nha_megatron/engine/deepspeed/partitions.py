"""The optimizer's state under ZeRO, one parameter at a time: read whole, written in parts.

ZeRO keeps for each parameter an fp32 copy (`param`) and Adam's two moments (`exp_avg`, `exp_avg_sq`), cut over the ranks of the
data x context group. Here they look like tensors of the parameter's shape on its tensor rank, whatever ZeRO stage. Built on DeepSpeed's
`safe_get_*` and `safe_set_*`, with the gaps that they leave (0.19.8):

- moments exist only after the first update: `create_adam_state` makes those of step 0;
- a whole tensor cannot be written under ZeRO 3 when its size does not divide by the ranks: `write` pads it;
- the fp32 copy alone is written: `write` writes the weights that the model computes with, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def flat_partitions(optimizer: Any) -> list[Tensor]:
    """This rank's parts of the fp32 weights, flat: what Adam updates. `optimizer` is that of a DeepSpeed engine, of any ZeRO stage."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            partitions: list[Tensor] = getattr(optimizer, name)
            return partitions
    raise AssertionError(f"not an optimizer of ZeRO 1, 2 or 3: {type(optimizer).__name__}")


def create_adam_state(optimizer: Any, fused: bool) -> None:
    """Gives every partition the moments of step 0, and every parameter its view of them."""
    for partition in flat_partitions(optimizer):
        assert partition not in optimizer.optimizer.state
        optimizer.optimizer.state[partition] = {
            "step": torch.zeros((), dtype=torch.float32, device=partition.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(partition),
            "exp_avg_sq": torch.zeros_like(partition),
        }
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):  # ZeRO 1 and 2
        optimizer._lazy_init_hp_params_optimizer_state()


def get_step(optimizer: Any) -> float:
    """Updates that Adam has done."""
    steps = {float(state["step"]) for state in optimizer.optimizer.state.values()}
    assert len(steps) == 1, steps
    return steps.pop()


def set_step(optimizer: Any, step: float) -> None:
    for state in optimizer.optimizer.state.values():
        state["step"].fill_(step)


def read(parameter: nn.Parameter, key: str) -> Tensor:
    """`param`, `exp_avg` or `exp_avg_sq` of a parameter, whole, in fp32, on every rank of the group. Collective over it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if key == "param":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, key)


@torch.no_grad()
def write(parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """Takes this rank's part of a whole tensor. With `param`, the weights that the model computes with take it too."""
    value = value.to(parameter.device, torch.float32)
    if hasattr(parameter, "ds_id"):
        _write_zero_3(parameter, key, value)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if key == "param":
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _write_zero_3(parameter: Any, key: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    rank, ranks = parameter.ds_process_group.rank(), parameter.ds_process_group.size()
    part = F.pad(value.flatten(), (0, size * ranks - value.numel())).narrow(0, rank * size, size)
    if key != "param":
        safe_set_local_optimizer_state(parameter, part, key)
        return
    safe_set_local_fp32_param(parameter, part)
    parameter.ds_tensor.copy_(part)
    if parameter.numel():  # small ones stay whole on every rank
        parameter.copy_(value)
