"""The DeepSpeed engine: ZeRO 1, 2 and 3 over data x context ranks, with Megatron's tensor-parallel layers."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from nha_megatron.config.engines import zero_settings
from nha_megatron.engine.base import Engine, StepResult
from nha_megatron.engine.deepspeed.partitions import create_adam_state, read, write
from nha_megatron.engine.deepspeed.replicated_gradients import ReplicatedGradients
from nha_megatron.engine.deepspeed.setup import ModelParallelUnit, build_sharded, deepspeed_config, import_deepspeed
from nha_megatron.engine.deepspeed.state import ModelSpaceState
from nha_megatron.engine.forward import forward_batch
from nha_megatron.engine.layout import Layout
from nha_megatron.model.build import build_model
from nha_megatron.model.initialize import initialize_weights

if TYPE_CHECKING:
    from nha_megatron.config import RunConfig
    from nha_megatron.data import Batch

_META = torch.device("meta")


class _AdamW(torch.optim.AdamW):
    """AdamW that lets an update pass by while it is `held`: DeepSpeed measures and clears the gradients, and nothing else changes."""

    held = False

    def step(self, closure: Any = None) -> Any:
        return None if self.held else super().step(closure)


class DeepSpeedEngine(Engine):
    """Trains one model over a `Layout` without pipeline stages.

    DeepSpeed averages gradients over the group in which it shards. Each rank's loss is therefore its sum, times the size of the group,
    divided by the tokens that count in the whole global batch, which are known before the first forward: the average is then the
    gradient of the mean loss, whatever the layout.
    """

    def __init__(self, config: RunConfig, device: torch.device, layout: Layout) -> None:
        assert layout.pp_size == 1, "refused by config/deepspeed.py"
        super().__init__(config, device, layout)
        zero = zero_settings(config.training)
        assert zero is not None
        self.choices.append(f"engine deepspeed, ZeRO stage {zero.stage}")
        self.modules_gather_weights = zero.stage == 3
        # Now and then the process aborts when gloo's groups are destroyed after ZeRO 3 (DeepSpeed 0.19.8, torch 2.13).
        self.leaves_groups_alone = zero.stage == 3 and device.type == "cpu"
        package = import_deepspeed(device)
        (self._twin,) = build_model(config, _META, layout.groups)
        settings = deepspeed_config(config, sum(parameter.numel() for parameter in self._twin.parameters()))
        unit = ModelParallelUnit(layout)
        if zero.stage == 3:
            model = build_sharded(config, device, layout, settings, unit)
        else:
            (model,) = build_model(config, device, layout.groups)
            initialize_weights([model], config.model, config.training.seed, layout.tp_rank, layout.tp_size)
        self._parameters = dict(model.named_parameters())
        self._replicated = ReplicatedGradients(model, layout.groups.tp, layout.world, device)
        self._fused = device.type == "cuda"
        self._adam = self._make_optimizer()
        with contextlib.redirect_stdout(io.StringIO()):  # a table of memory for each parameter group
            self._engine, *_ = package.initialize(
                model=Float16Module(model.config, model) if config.training.precision == "bf16" else model,
                optimizer=self._adam,
                config=settings,
                mpu=unit,
                dist_init_required=False,
            )
        self.model_chunks = [self._engine.module]
        self.optimizer = self._engine.optimizer
        create_adam_state(self.optimizer, self._fused)
        self._state = ModelSpaceState(self._parameters, self._twin, self.optimizer, layout.groups.dp_cp)

    def _make_optimizer(self) -> _AdamW:
        settings = self.config.optimizer
        exempt = {name for name, twin in self._twin.named_parameters() if twin.no_weight_decay}
        decayed = [parameter for name, parameter in self._parameters.items() if name not in exempt]
        others = [parameter for name, parameter in self._parameters.items() if name in exempt]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return _AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=self._fused)

    def train_step(self, batches: Sequence[Batch], lr: float, max_loss: float = math.inf) -> StepResult:
        """See `Engine`."""
        tokens = self._count(batches)
        self._require_counted(tokens)
        self._set_learning_rate(lr)
        loss_sum = self._accumulate_gradients(batches, tokens)
        # Every term is the same number on every rank, so all ranks decide alike. The comparison is false for NaN.
        faulty = self._replicated.take_faulty()
        self._adam.held = faulty or not (math.isfinite(loss_sum) and loss_sum / tokens <= max_loss)
        self._engine.step()
        finite = self._engine.was_step_applied() and not faulty
        return StepResult(
            loss=loss_sum / tokens,
            tokens=tokens,
            grad_norm=float(self._engine.get_global_grad_norm()) if finite else math.nan,
            skipped=self._adam.held or not finite,
        )

    def _count(self, batches: Sequence[Batch]) -> int:
        count = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum().to(self.device)
        dist.all_reduce(count, group=self.layout.groups.dp_cp)
        return int(count.item())

    def _accumulate_gradients(self, batches: Sequence[Batch], tokens: int) -> float:
        """Backward of every micro batch; returns the loss sum of the global batch."""
        self._engine.train()
        scale = self.layout.groups.dp_cp.size() / tokens
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss, _ = forward_batch(self._engine, batch, self.layout)
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
        dist.all_reduce(total, group=self.layout.groups.dp_cp)
        return total.item()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """See `Engine`."""
        self._engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            total += forward_batch(self._engine, batch, self.layout)[0]
        dist.all_reduce(total, group=self.layout.groups.dp_cp)
        return total.item(), self._count(batches)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See `Engine`. Under ZeRO 3 those that are partitioned are empty."""
        return iter(self._parameters.items())

    def _weights_to_save(self) -> Iterable[Tensor]:
        # Not the partitions themselves: those of ZeRO 3 end in padding, which is whatever was in memory.
        return (read(parameter, "param") for parameter in self._parameters.values())

    def _shaped_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._twin.named_parameters()

    def _take_weight(self, name: str, parameter: nn.Parameter, shard: Tensor) -> None:
        own = self._parameters[name]
        write(own, "param", shard.to(own.dtype))

    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]:
        """See `Engine`."""
        return self._state.to_load() if is_loading else self._state.to_save()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        self._state.take(state)

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the parameters, which keep engine, state and process groups (each with threads, on gloo) for ever.

        Under ZeRO 3 something of it stays all the same (0.19.8), so what is large is emptied.
        """
        self._engine.destroy()
        self._engine.optimizer = None
        self.optimizer.__dict__.clear()
        for parameter in self._parameters.values():
            parameter.data = parameter.new_empty(0)
            parameter.__dict__.clear()
        self._adam.state.clear()
