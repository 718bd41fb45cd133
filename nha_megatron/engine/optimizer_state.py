"""The optimizer's part of a checkpoint, which every engine reads whichever wrote it.

    optimizer.state.param.<name>    fp32 weights
    optimizer.state.exp_avg.<name>, optimizer.state.exp_avg_sq.<name>

each a whole tensor in model space, cut only along the tensor-parallel dimension: no size of any layout is in them. Beside the tensors stand
the parameter groups, in one of two forms: with all settings, as Megatron's distributed optimizer writes them, or with no more than how many
updates they have seen (`steps_only`), because the rest follows from the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")

# Stands in the form with steps only, and names the engine that wrote it, for people.
_WRITER = "engine"


def steps_only(step: float, param_state: Mapping[str, Mapping[str, Any]], writer: str) -> dict[str, Any]:
    """The form that knows of the parameter groups only the updates done. param_state: name -> STATE_KEYS -> tensor."""
    return {_WRITER: writer, "optimizer": {"param_groups": [{"step": step}]}, "param_state": param_state}


def updates_done(loaded: Mapping[str, Any]) -> float:
    """Updates that the optimizer had done, in either form."""
    (step,) = {float(group["step"]) for group in loaded["optimizer"]["param_groups"]}
    return step


def with_all_settings(loaded: dict[str, Any], own: Mapping[str, Any], sharding_type: str) -> dict[str, Any]:
    """Either form in the one that Megatron's distributed optimizer loads.

    Args:
        own: `state_dict()` of the optimizer that loads.
    """
    if _WRITER not in loaded:
        return loaded
    step = updates_done(loaded)
    groups = [{**group, "step": step} for group in own["optimizer"]["param_groups"]]
    return {"optimizer": {"param_groups": groups}, "param_state": loaded["param_state"], "param_state_sharding_type": sharding_type}
