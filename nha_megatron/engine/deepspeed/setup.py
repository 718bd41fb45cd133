"""Brings DeepSpeed up beside Megatron: on the run's device, over the process groups of its `Layout`, told by its configuration.

The only module that touches DeepSpeed's globals. DeepSpeed 0.19.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from nha_megatron.config import ConfigError
from nha_megatron.config.engines import zero_settings
from nha_megatron.engine.layout import Layout
from nha_megatron.model.build import build_model
from nha_megatron.model.initialize import initial_shard

if TYPE_CHECKING:
    from nha_megatron.config import RunConfig


def import_deepspeed(device: torch.device) -> Any:
    """The package, set to the kind of `device`. Raises ConfigError when it is missing, or was imported for another device."""
    # Read once, at the import. By itself DeepSpeed takes CUDA where there is any, also for a run on the CPU.
    os.environ["DS_ACCELERATOR"] = device.type
    # The launcher sets it; a single process started without one has none, and DeepSpeed insists.
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"training.engine deepspeed needs the package deepspeed, which cannot be imported here ({error}): "
            "pip install 'nha-megatron[deepspeed]', or use training.engine megatron"
        ) from None
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    if name != device.type:
        raise ConfigError(f"DeepSpeed was set up for {name} in this process, the run is on {device.type}; start a process of its own")
    if device.type == "cpu":
        # Otherwise the first start compiles, for a minute, an operator that only inference uses. Asking for this table runs compilers
        # and queries GPUs, so elsewhere it is not asked for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_worth_saying)
    _forget_earlier_engine()
    return deepspeed


def _worth_saying(record: logging.LogRecord) -> bool:
    # torch's AdamW, in a subclass that can pause.
    return "untested optimizer" not in record.getMessage().lower()


def _forget_earlier_engine() -> None:
    """Drops what DeepSpeed keeps of an engine that this process had before, so that its memory and its groups can go.

    It caches torch's world group, which may have been left for another one, and under ZeRO 3 the model.
    """
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.utils import groups

    groups._release_process_group_references()
    comm.cdb = None
    parameter_offload.FWD_MODULE_STACK.clear()
    gc.collect()


class ModelParallelUnit:
    """What DeepSpeed asks of Megatron's groups: gradients and state go over data x context ranks, matrices over tensor ranks.

    `megatron.core.parallel_state` itself will not do: it lacks the functions with `model_parallel` in their names.
    """

    def __init__(self, layout: Layout) -> None:
        self._model, self._data = layout.groups.tp, layout.groups.dp_cp

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_model_parallel_rank(self) -> int:
        return self._model.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._model.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._data)


def deepspeed_config(config: RunConfig, rank_parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration of the run.

    Args:
        rank_parameters: elements of the weights of one rank before ZeRO shards them. No bucket is larger.
    """
    zero = zero_settings(config.training)
    assert zero is not None
    given = zero.model_dump(exclude_none=True)
    defaults = {"reduce_bucket_size": 500_000_000}
    if zero.stage < 3:
        defaults["allgather_bucket_size"] = 500_000_000
    else:
        defaults["stage3_prefetch_bucket_size"] = 50_000_000
    buckets = {name: min(given.get(name, size), _even(rank_parameters)) for name, size in defaults.items()}
    stage_only = {"allgather_bucket_size"} if zero.stage == 3 else set()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        # The engine says itself which micro batch is the last of a step.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_grad,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {name: value for name, value in (given | buckets).items() if name not in stage_only},
        # AdamW comes from torch (fused on CUDA), which DeepSpeed takes where it is told to. Its own would be compiled at the first start,
        # by an nvcc that a user may not have.
        "zero_allow_untested_optimizer": True,
    }
    if config.training.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return settings


def _even(count: int) -> int:
    # ZeRO 1 and 2 want their gather bucket aligned to two elements.
    return count + count % 2


def build_sharded(config: RunConfig, device: torch.device, layout: Layout, settings: dict[str, Any], unit: ModelParallelUnit) -> nn.Module:
    """The model with initial weights that ZeRO 3 has sharded over data x context ranks, one after the other as they are drawn.

    So no rank ever holds more than its part and one weight. Until it is drawn, a weight is memory of the host that nobody has touched.
    """
    from deepspeed import comm, zero

    (model,) = build_model(config, torch.device("cpu"), layout.groups)
    comm.init_distributed(dist_init_required=False)
    zero.Init(
        module=_DrawnOneByOne(model, config, device, layout),
        data_parallel_group=layout.groups.dp_cp,
        config_dict_or_path=settings,
        mpu=unit,
    )
    return model.to(device)  # what is left: buffers


class _DrawnOneByOne(nn.Module):
    """A model that gives each of its parameters its initial value when it is asked for it, on `device`."""

    def __init__(self, model: nn.Module, config: RunConfig, device: torch.device, layout: Layout) -> None:
        super().__init__()
        self._arguments = (model, config, device, layout)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        model, config, device, layout = self._arguments
        for name, parameter in model.named_parameters():
            seed, place = config.training.seed, (layout.tp_rank, layout.tp_size)
            parameter.data = initial_shard(name, parameter, config.model, seed, *place, device).to(parameter.dtype).contiguous()
            yield parameter
