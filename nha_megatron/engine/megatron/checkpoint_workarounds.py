"""Loading torch Adam state into Megatron's distributed optimizer, where TransformerEngine and Apex are absent.

Four gaps of megatron-core 0.16.1 and 0.19.2, on CPU and CUDA alike:
- `DistributedOptimizer.state_dict` asserts that there is one `step` value, which a fresh torch Adam does not have: `create_adam_state`.
- the `fully_reshardable` loader leaves `step` out of what it hands on, and the receiver asks for it: `pass_step_on`.
  (The step itself comes back through the parameter groups.)
- `DistributedOptimizer.load_state_dict` gives all parameters one and the same `step` tensor, to which Adam then adds 1 once for each of
  them, so that the bias correction jumps ahead: `separate_steps`.
- the `fully_reshardable` saver cuts parameters out of a tensor without the padding between buckets, at offsets that count it. With
  more than one bucket (tied embeddings over pipeline stages have their own; overlapped gradient reduction makes many) it saves shifted
  state, zero-filled at the end: `keep_bucket_padding`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def distributed_optimizers(optimizer: Any) -> list[DistributedOptimizer]:
    """The distributed optimizers inside a (chained) Megatron optimizer."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    assert all(isinstance(part, DistributedOptimizer) for part in parts), [type(part) for part in parts]
    return parts


def create_adam_state(optimizer: Any) -> None:
    """Gives every parameter without optimizer state the state of step 0. Parameters that have one keep it."""
    for part in distributed_optimizers(optimizer):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            continue  # TransformerEngine and Apex keep the step in the parameter group
        for group in inner.param_groups:
            for parameter in group["params"]:
                if parameter not in inner.state:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def pass_step_on(optimizer: Any) -> None:
    """Makes the receiver of loaded optimizer state keep the `step` that it has when the loader hands none."""
    for part in distributed_optimizers(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            part._set_main_param_and_optimizer_states = _KeepStep(part)


def keep_bucket_padding(optimizer: Any) -> None:
    """Makes the saver's tensors as long as the buffers, so that the offsets of parameters hold in them."""
    for part in distributed_optimizers(optimizer):
        part.get_parameter_state_dp_zero = _KeepBucketPadding(part)


class _KeepBucketPadding:
    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self.optimizer = optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        state = DistributedOptimizer.get_parameter_state_dp_zero(self.optimizer, *args, **kwargs)
        if state is None:  # on the ranks that do not save
            return None
        for index, buffer in enumerate(self.optimizer.buffers):
            if len(buffer.buckets) == 1:
                continue
            for tensors in state[index].values():
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[key] = self._spread(tensors[key], buffer)
        return state

    @staticmethod
    def _spread(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
        spread = packed.new_zeros(buffer.numel)
        start = 0
        for bucket in buffer.buckets:
            spread[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[start : start + bucket.numel_unpadded]
            start += bucket.numel_unpadded
        return spread


def separate_steps(optimizer: Any) -> None:
    """Gives every parameter a step counter of its own again, after loading."""
    for part in distributed_optimizers(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


class _KeepStep:
    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self.optimizer = optimizer

    def __call__(self, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        if "step" not in tensors:
            group, index = self.optimizer.model_param_group_index_map[model_param]
            main_parameter = self.optimizer.optimizer.param_groups[group]["params"][index]
            tensors = {**tensors, "step": self.optimizer.optimizer.state[main_parameter]["step"]}
        DistributedOptimizer._set_main_param_and_optimizer_states(self.optimizer, model_param, tensors)
