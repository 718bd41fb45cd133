"""Which rank does what: starts `torch.distributed`, builds Megatron's process groups, seeds the generators.

This is the only module that writes or reads Megatron's global `parallel_state`. Everything below it gets its groups from
`Layout.groups`. (Megatron's own schedules and optimizer read the globals too; `create_layout` sets them.)
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nha_megatron.engine import cpu_workarounds
from nha_megatron.engine.device import backend_for
from nha_megatron.engine.environment import meeting_place

if TYPE_CHECKING:
    from nha_megatron.config import RunConfig


@dataclass(frozen=True)
class Layout:
    """This process's place in the grid. Rank order (fastest first): tensor, context, data, pipeline."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    pp_rank: int
    pp_size: int
    device: torch.device
    groups: ProcessGroupCollection
    """`.tp`, `.cp`, `.dp`, `.pp`, `.dp_cp`, ... Gradients are summed over `.dp_cp`."""
    world: dist.ProcessGroup
    """All ranks."""

    @property
    def is_last_pipeline_stage(self) -> bool:
        """Whether the loss is computed on this rank."""
        return self.pp_rank == self.pp_size - 1

    def describe(self) -> str:
        """One line for logs, such as `world 8 = TP 2 x CP 2 x DP 1 x PP 2`."""
        return f"world {self.world_size} = TP {self.tp_size} x CP {self.cp_size} x DP {self.dp_size} x PP {self.pp_size}"


def create_layout(config: RunConfig, device: torch.device) -> Layout:
    """Joins the process group (torchrun's environment, or a single process without one) and splits it as `config.parallel` says.

    A process group that exists already is used as it is. Raises ConfigError if the world size does not fit the configuration.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Longer than the stall watch of training waits: it names the missing rank, a timeout of a collective names the waiting one.
    timeout = timedelta(seconds=1.5 * config.training.stall_seconds + 60)
    if not dist.is_initialized():
        _init_process_group(device, timeout)
    world_size = dist.get_world_size()
    config.check_world(world_size)
    cpu_workarounds.enter(device)  # not before: what is refused above leaves this process as it was

    parallel = config.parallel
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline != 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layout = Layout(
        rank=dist.get_rank(),
        world_size=world_size,
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        cp_rank=groups.cp.rank(),
        cp_size=groups.cp.size(),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        pp_rank=groups.pp.rank(),
        pp_size=groups.pp.size(),
        device=device,
        groups=groups,
        world=dist.group.WORLD,
    )
    _seed(config.training.seed, layout)
    return layout


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    backend = backend_for(device)
    if meeting_place() is not None:
        dist.init_process_group(backend, timeout=timeout, device_id=device if backend == "nccl" else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _seed(seed: int, layout: Layout) -> None:
    # Weights are drawn per parameter name (model/initialize.py) and data order is a pure function of its own seed, so these
    # generators serve only what is left, and differ by pipeline stage as Megatron's do.
    seed = seed + 100 * layout.pp_rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # Seeds the tracker that Megatron forks in every tensor-parallel region; on the CPU it holds the CPU generator's state.
    model_parallel_cuda_manual_seed(seed, tp_rank=layout.tp_rank, ep_rank=0, etp_rank=0, force_reset_rng=True)
