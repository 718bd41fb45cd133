"""What the ranks run in the tests of engine and model: a tiny model, made-up batches, full gradients whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nha_megatron.config import RunConfig, parse_config
from nha_megatron.data import Batch
from nha_megatron.engine.device import choose_device
from nha_megatron.engine.layout import Layout, create_layout
from nha_megatron.engine.megatron import MegatronEngine
from nha_megatron.model.parameters import full_from_shards

SEQUENCE, VOCABULARY, ROWS = 64, 100, 4
CPU = torch.device("cpu")


def tiny_config(**sections: dict[str, Any]) -> RunConfig:
    """Four layers of hidden size 64 with a window each; `sections` change single fields.

    The vocabulary is not a multiple of 128, so half of the last TP rank's columns are padding. No window is wider than a shard of
    CP 4. KV heads are shared by two query heads.
    """
    base: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_heads": 4,
            "num_kv_heads": 2,
            "num_slots": 6,
            "window": "16,3,0,7",
            "vocab_size": VOCABULARY,
            # Larger than usual, so that attention is far from uniform and gradients far from zero.
            "init_std": 0.1,
        },
        "parallel": {},
        "data": {"path": "unused", "sequence_length": SEQUENCE},
        "training": {"steps": 10, "micro_batch_size": 1, "global_batch_size": ROWS, "device": "cpu", "seed": 7},
        "optimizer": {"lr": 1e-3},
        "logging": {"directory": "unused"},
    }
    for section, fields in sections.items():
        base[section].update(fields)
    return parse_config(base)


def make_engine(config: RunConfig) -> MegatronEngine:
    device = choose_device(config.training.device)
    return MegatronEngine(config, device, create_layout(config, device))


def micro_batches(
    config: RunConfig, layout: Layout, step: int, *, masks: str = "full", documents: bool | tuple[int, ...] = False
) -> list[Batch]:
    """This rank's part of global batch `step`.

    masks: `uneven` for very different counts per row, and a row's last quarter without any. documents: boundaries in the first row of
    every micro batch, beside the rows' edges; True: one early, one in the middle of a window.
    """
    rows, length, micro = config.training.global_batch_size, config.data.sequence_length, config.training.micro_batch_size
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, config.model.vocab_size, (rows, length + 1), generator=generator)
    mask = torch.ones(rows, length)
    if masks == "uneven":
        keep = torch.linspace(0.1, 0.9, rows).unsqueeze(1)
        mask = (torch.rand(rows, length, generator=generator) < keep).float()
        mask[0, -length // 4 :] = 0
    shard = slice(layout.cp_rank * length // layout.cp_size, (layout.cp_rank + 1) * length // layout.cp_size)
    cu_seqlens = None
    if documents:
        inner = (5, 29) if documents is True else documents
        cu_seqlens = torch.tensor([0, *inner, *range(length, micro * length + 1, length)], dtype=torch.int32)
    batches = []
    for start in range(0, rows, micro * layout.dp_size):
        own = slice(start + layout.dp_rank * micro, start + (layout.dp_rank + 1) * micro)
        batches.append(
            Batch(
                tokens=tokens[own, :-1][:, shard].contiguous(),
                labels=tokens[own, 1:][:, shard].contiguous(),
                loss_mask=mask[own][:, shard].contiguous(),
                cu_seqlens=cu_seqlens,
            )
        )
    return batches


def train(config: RunConfig, steps: int = 5, **batch_options: Any) -> dict[str, Any]:
    """Gradients of the first global batch, then `steps` updates.

    Returns loss curve, gradient norms and token counts; `gradients` and `weights` hold full tensors of this pipeline stage on the first
    rank of its data, context and tensor group, and are empty elsewhere.
    """
    engine = make_engine(config)
    layout = engine.layout
    weights = full_tensors(engine, ((name, parameter, parameter.detach()) for name, parameter in engine.named_parameters()))
    engine._accumulate_gradients(micro_batches(config, layout, 0, **batch_options))
    gradients = full_gradients(engine)
    results = [engine.train_step(micro_batches(config, layout, step, **batch_options), config.optimizer.lr) for step in range(steps)]
    return {
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "tokens": [result.tokens for result in results],
        "validation": engine.evaluate(micro_batches(config, layout, 99, **batch_options)),
        "gradients": gradients,
        "weights": weights,
    }


def full_gradients(engine: MegatronEngine) -> dict[str, Tensor]:
    """Full gradients of this stage's parameters (see `full_tensors`), after `_accumulate_gradients`."""
    group = engine.layout.groups.dp_cp
    for chunk in engine.model_chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                # The distributed optimizer reduce-scatters: each rank of the group holds the sum in its own part of a bucket.
                parts = [torch.empty_like(part) for part in bucket.grad_data.chunk(group.size())]
                dist.all_gather(parts, bucket.grad_data.chunk(group.size())[group.rank()].clone(), group=group)
                bucket.grad_data.copy_(torch.cat(parts))
    return full_tensors(engine, ((name, parameter, parameter.main_grad) for name, parameter in engine.named_parameters()))


def full_tensors(engine: MegatronEngine, named: Iterator[tuple[str, torch.nn.Parameter, Tensor]]) -> dict[str, Tensor]:
    """Tensors laid out as their parameters, joined over the TP group, on one rank of the stage; {} on the others."""
    groups = engine.layout.groups
    full = {}
    for name, parameter, tensor in named:
        shards = [torch.empty_like(tensor) for _ in range(groups.tp.size())]
        dist.all_gather(shards, tensor.contiguous(), group=groups.tp)
        full[name] = full_from_shards(shards, parameter).clone().cpu()
    return full if groups.tp.rank() == 0 and groups.dp_cp.rank() == 0 else {}
