"""Gradients of parameters that all tensor ranks hold, for an engine that cuts gradients up as soon as they are made.

The Megatron engine does both when all gradients are there: it sums those of norms under sequence parallelism, and its norm counts
a replicated parameter once.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nha_megatron.engine.replicas import require_equal_gradients


class ReplicatedGradients:
    """Hooks on the replicated parameters of `model`; none with one tensor rank. `group`: the tensor ranks; `world`: all ranks.

    - Under sequence parallelism a norm sees other tokens on every tensor rank: its gradient becomes their sum, in fp32, in every backward.
    - One that is not finite on any rank is remembered: only the first tensor rank's copy is counted in a gradient norm, and a faulty
      device would otherwise update its copy with NaN, unseen.
    - Those of the first backward are compared over the tensor ranks (engine/replicas.py).
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, world: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._world = group, world
        self._faulty = torch.zeros((), device=device)
        self._first_norms: dict[str, Tensor] | None = {}
        if group.size() == 1:
            return
        for name, parameter in model.named_parameters():
            if getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(self._sum)
            if not getattr(parameter, "tensor_model_parallel", False):
                parameter.register_hook(partial(self._look, name))

    def take_faulty(self) -> bool:
        """Whether any rank has seen a gradient that is not finite since the last call. Collective over all ranks.

        Raises `OneRankError` on the first call where copies of a weight have different gradients.
        """
        if self._group.size() == 1:
            return False
        if self._first_norms is not None:
            require_equal_gradients(self._first_norms, self._group)
            self._first_norms = None
        dist.all_reduce(self._faulty, group=self._world)
        faulty = self._faulty.item() > 0
        self._faulty.zero_()
        return faulty

    def _sum(self, gradient: Tensor) -> Tensor:
        total = gradient.to(torch.float32, copy=True)
        dist.all_reduce(total, group=self._group)
        return total.to(gradient.dtype)

    def _look(self, name: str, gradient: Tensor) -> None:
        if self._first_norms is not None:
            self._first_norms.setdefault(name, gradient.norm())
        self._faulty += gradient.isfinite().logical_not().any()
