"""Checkpoints of the DeepSpeed engine: the same tensors under the same names as the Megatron engine's.

    <name>                       weights in the training precision
    optimizer.state. ...         fp32 weights and Adam's moments (engine/optimizer_state.py)

each a whole tensor in model space. So neither the ZeRO stage nor any size is in them: a run goes on at another ZeRO stage, on another grid,
or under the other engine, and exporters see one format.

Under ZeRO a tensor is spread over a data x context group. One rank of the group is its *owner*: it alone keeps the tensor that the others
help to put together, in host memory, and writes it; on loading it alone reads it, and hands it to the others. So each rank holds its share
of the state and one whole parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nha_megatron.engine.deepspeed.partitions import get_step, read, set_step, write
from nha_megatron.engine.optimizer_state import STATE_KEYS, steps_only, updates_done


class ModelSpaceState:
    """The state of a DeepSpeed engine as a state dict for `megatron.core.dist_checkpointing`, and back.

    Args:
        parameters: this rank's parameters under ZeRO, by name in the model.
        twin: the same model on the meta device. Under ZeRO 3 it alone knows shapes and how tensor parallelism cuts them.
        optimizer: the optimizer of the DeepSpeed engine.
        group: the data x context group.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], twin: nn.Module, optimizer: Any, group: dist.ProcessGroup) -> None:
        self._parameters, self._twin, self._optimizer, self._group = parameters, twin, optimizer, group
        self._shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
        assert self._shapes.keys() == parameters.keys()
        self._dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        self._owners = _share(self._shapes, group.size())

    def to_save(self) -> dict[str, Any]:
        """Collective. On each rank the tensors that it owns, in host memory."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters.items():
            whole = {}
            for key in STATE_KEYS:
                tensor = read(parameter, key)
                if self._owns(name):
                    whole[key] = tensor.to("cpu", copy=True)
            if whole:
                tensors[name] = whole
        # The weights that the model computes with are the fp32 weights, rounded.
        weights = {name: whole["param"].to(self._dtypes[name]) for name, whole in tensors.items()}
        return self._state(weights, tensors)

    def to_load(self) -> dict[str, Any]:
        """On each rank empty tensors for what it owns."""
        own = {name: shape for name, shape in self._shapes.items() if self._owns(name)}
        tensors = {name: {key: torch.empty(shape, dtype=torch.float32) for key in STATE_KEYS} for name, shape in own.items()}
        weights = {name: torch.empty(shape, dtype=self._dtypes[name]) for name, shape in own.items()}
        return self._state(weights, tensors)

    def take(self, state: Mapping[str, Any]) -> None:
        """Continues from what was loaded into `to_load()`. Collective."""
        optimizer = state["optimizer"]
        for name, parameter in self._parameters.items():
            for key in STATE_KEYS:
                tensor = torch.empty(self._shapes[name], dtype=torch.float32, device=parameter.device)
                if self._owns(name):
                    tensor.copy_(optimizer["param_state"][name][key])
                dist.broadcast(tensor, dist.get_global_rank(self._group, self._owners[name]), group=self._group)
                write(parameter, key, tensor)
        set_step(self._optimizer, updates_done(optimizer))

    def _owns(self, name: str) -> bool:
        return self._owners[name] == self._group.rank()

    def _state(self, weights: Mapping[str, Tensor], tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        templates = self._templates()
        model = {name: value for name, value in templates.items() if name not in self._shapes}  # layers' extra state
        model |= {name: _filled(templates[name], weight) for name, weight in weights.items()}
        param_state = {
            name: {key: _filled(templates[name], tensor, f"optimizer.state.{key}.") for key, tensor in whole.items()}
            for name, whole in tensors.items()
        }
        return {"model0": model, "optimizer": steps_only(get_step(self._optimizer), param_state, writer="deepspeed")}

    def _templates(self) -> dict[str, Any]:
        return self._twin.sharded_state_dict(metadata={"dp_cp_group": self._group})


def _filled(template: Any, tensor: Tensor, prefix: str = "") -> Any:
    """The sharded tensor (or factory of several) that describes `tensor` on its one owner in the data x context group."""
    changes: dict[str, Any] = {"key": prefix + template.key, "data": tensor, "replica_id": (*template.replica_id[:-1], 0)}
    if hasattr(template, "dtype"):
        changes["dtype"] = tensor.dtype
    return replace(template, **changes)


def _share(shapes: Mapping[str, torch.Size], ranks: int) -> dict[str, int]:
    """An owner for every parameter, so that the ranks own about as much each. The same on all ranks."""
    load = [0] * ranks
    owners = {}
    for name in _largest_first(shapes):
        owner = load.index(min(load))
        owners[name] = owner
        load[owner] += shapes[name].numel()
    return owners


def _largest_first(shapes: Mapping[str, torch.Size]) -> Iterator[str]:
    return iter(sorted(shapes, key=lambda name: (-shapes[name].numel(), name)))
