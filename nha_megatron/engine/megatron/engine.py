"""The Megatron engine: DistributedDataParallel, the distributed optimizer, and Megatron's pipeline schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from nha_megatron.engine.base import Engine, StepResult
from nha_megatron.engine.finite import finite_on_all_ranks
from nha_megatron.engine.forward import forward_batch
from nha_megatron.engine.layout import Layout
from nha_megatron.engine.megatron.checkpoint_workarounds import (
    create_adam_state,
    distributed_optimizers,
    keep_bucket_padding,
    pass_step_on,
    separate_steps,
)
from nha_megatron.engine.megatron.gradient_fusion import choose_gradient_fusion
from nha_megatron.engine.optimizer_state import with_all_settings
from nha_megatron.engine.replicas import require_equal_gradients
from nha_megatron.model.build import build_model
from nha_megatron.model.initialize import initialize_weights
from nha_megatron.model.loss import loss_report
from nha_megatron.model.parameters import global_parameters

if TYPE_CHECKING:
    from nha_megatron.config import RunConfig
    from nha_megatron.data import Batch

# The only format of optimizer state that survives a change of TP, PP, CP and DP sizes.
_CHECKPOINT_FORMAT = "fully_reshardable"


class MegatronEngine(Engine):
    """Trains one model over a `Layout`.

    The optimizer is the distributed one in every layout, also where data and context parallelism are 1: one code path, and one
    checkpoint format for all of them.
    """

    def __init__(self, config: RunConfig, device: torch.device, layout: Layout) -> None:
        super().__init__(config, device, layout)
        fuse_gradients, reason = choose_gradient_fusion(config.training, device)
        self.choices.append(f"gradient accumulation fusion: {'on' if fuse_gradients else 'off'}, {reason}")
        chunks = build_model(config, device, layout.groups, fuse_gradients=fuse_gradients)
        initialize_weights(chunks, config.model, config.training.seed, layout.tp_rank, layout.tp_size)
        self.model_chunks = self._wrap(chunks)
        self.optimizer = self._make_optimizer()
        pass_step_on(self.optimizer)
        keep_bucket_padding(self.optimizer)
        megatron_config = chunks[0].config
        megatron_config.finalize_model_grads_func = finalize_model_grads
        megatron_config.grad_scale_func = None  # bfloat16 needs no loss scale
        self._forward_backward = get_forward_backward_func()
        self._replicas_are_compared = False

    def _wrap(self, chunks: list[nn.Module]) -> list[nn.Module]:
        megatron_config = chunks[0].config
        if self.config.training.precision == "bf16":
            chunks = [Float16Module(megatron_config, chunk) for chunk in chunks]
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False)
        return [
            DistributedDataParallel(megatron_config, ddp_config, chunk, disable_bucketing=i > 0, pg_collection=self.layout.groups)
            for i, chunk in enumerate(chunks)
        ]

    def _make_optimizer(self) -> Any:
        settings = self.config.optimizer
        dtype = next(self.model_chunks[0].parameters()).dtype
        optimizer_config = OptimizerConfig(
            optimizer="adam",  # with decoupled decay: AdamW
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        )
        no_decay = ParamKey(attr="no_weight_decay")
        optimizer = get_megatron_optimizer(optimizer_config, self.model_chunks, config_overrides={no_decay: {"wd_mult": 0.0}})
        for group in optimizer.param_groups:
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        return optimizer

    def train_step(self, batches: Sequence[Batch], lr: float, max_loss: float = math.inf) -> StepResult:
        """See `Engine`."""
        loss_sum, tokens = self._accumulate_gradients(batches)
        self._require_counted(tokens)
        if not self._replicas_are_compared:
            self._compare_replicas()
        self._set_learning_rate(lr)
        self.optimizer.prepare_grads()
        grad_norm = self._grad_norm()
        # Every term is the same number on every rank, so all ranks decide alike. The comparison is false for NaN.
        applied = math.isfinite(grad_norm) and math.isfinite(loss_sum) and loss_sum / tokens <= max_loss
        if applied:
            self._clip(grad_norm)
            self.optimizer.step_with_ready_grads()
        return StepResult(loss=loss_sum / tokens, tokens=tokens, grad_norm=grad_norm, skipped=not applied)

    def _compare_replicas(self) -> None:
        norms = {
            name: parameter.main_grad.norm()
            for name, parameter in self.named_parameters()
            if not getattr(parameter, "tensor_model_parallel", False)
        }
        require_equal_gradients(norms, self.layout.groups.tp)
        self._replicas_are_compared = True

    def _grad_norm(self) -> float:
        """Norm of the whole gradient, the same on all ranks.

        Megatron counts a parameter that all tensor ranks hold on the first of them only. What the others have of it is looked at here:
        a faulty device would otherwise update its copy with NaN, unseen.
        """
        norm = float(self.optimizer.get_grad_norm())
        if self.layout.tp_size == 1:
            return norm
        replicated = (
            parameter.grad
            for optimizer in distributed_optimizers(self.optimizer)
            for parameter in optimizer.get_parameters()
            if parameter.grad is not None and not getattr(parameter, "tensor_model_parallel", False)
        )
        return norm if finite_on_all_ranks(replicated, self.device, self.layout.world) else math.nan

    def _clip(self, grad_norm: float) -> None:
        if self.config.optimizer.clip_grad == 0:
            return
        for optimizer in distributed_optimizers(self.optimizer):
            parameters = optimizer.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=self.config.optimizer.clip_grad, total_norm=grad_norm)

    def _accumulate_gradients(self, batches: Sequence[Batch]) -> tuple[float, int]:
        for chunk in self.model_chunks:
            chunk.zero_grad_buffer()
            chunk.train()
        self.optimizer.zero_grad()
        return self._run(batches, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """(loss sum, counted tokens) over all ranks' micro batches."""
        for chunk in self.model_chunks:
            chunk.eval()
        return self._run(batches, forward_only=True)

    def _run(self, batches: Sequence[Batch], forward_only: bool) -> tuple[float, int]:
        # Every chunk of an interleaved pipeline stage reads the same micro batches, each through an iterator of its own.
        iterators = [iter(batches) for _ in self.model_chunks]
        reports = self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model_chunks if len(self.model_chunks) > 1 else self.model_chunks[0],
            num_microbatches=len(batches),
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
        )
        # Only the last pipeline stage has reports; zeros elsewhere make the sum over pipeline stages a broadcast.
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for report in reports:
            total += report
        dist.all_reduce(total, group=self.layout.groups.dp_cp)
        dist.all_reduce(total, group=self.layout.groups.pp)
        loss_sum, tokens = total.tolist()
        return loss_sum, int(tokens)

    def _forward_step(self, iterator: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Any]:
        output, loss_mask = forward_batch(model, next(iterator), self.layout)
        return output, partial(loss_report, loss_mask=loss_mask)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See `Engine`."""
        return global_parameters(self.model_chunks)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        super().load_weights(weights)
        self.optimizer.reload_model_params()

    def _take_weight(self, name: str, parameter: nn.Parameter, shard: Tensor) -> None:
        parameter.copy_(shard)

    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]:
        """See `Engine`."""
        create_adam_state(self.optimizer)
        metadata = {"distrib_optim_sharding_type": _CHECKPOINT_FORMAT, "dp_cp_group": self.layout.groups.dp_cp}
        state: dict[str, Any] = {
            f"model{i}": chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(self.model_chunks)
        }
        state["optimizer"] = self.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
        return state

    @torch.no_grad()  # Megatron copies into views of leaf parameters
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        for i, chunk in enumerate(self.model_chunks):
            chunk.load_state_dict(state[f"model{i}"])
        self.optimizer.load_state_dict(with_all_settings(state["optimizer"], self.optimizer.state_dict(), _CHECKPOINT_FORMAT))
        separate_steps(self.optimizer)

    def close(self) -> None:
        """Nothing outside holds on to it: Python's garbage collector takes it once it is dropped."""
