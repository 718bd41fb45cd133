"""Document boundaries are copied once, to where attention reads them, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nha_megatron.data import Batch
from nha_megatron.engine.forward import forward_batch
from nha_megatron.layers.documents import Documents

META = torch.device("meta")  # stands for an accelerator
BOUNDARIES = (0, 3, 8)


def batch(cu_seqlens: Tensor | None) -> Batch:
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    return Batch(tokens, tokens, torch.ones(1, 8), cu_seqlens)


class Model(nn.Module):
    def forward(self, tokens: Tensor, packed_seq_params: Documents | None, **options: Any) -> Tensor:
        assert {tokens.device, options["labels"].device, options["loss_mask"].device} == {META}
        self.documents = packed_seq_params
        return tokens


def documents_over(context_ranks: int, cu_seqlens: Tensor | None) -> Documents | None:
    model, layout = Model(), SimpleNamespace(cp_size=context_ranks, device=META)
    forward_batch(model, batch(cu_seqlens), layout)  # type: ignore[arg-type]
    return model.documents


def test_one_context_rank_has_the_boundaries_on_its_device() -> None:
    documents = documents_over(1, torch.tensor(BOUNDARIES, dtype=torch.int32))
    assert documents is not None and documents.cu_seqlens is not None and documents.cu_seqlens.device == META


def test_several_context_ranks_have_them_on_the_host_alone() -> None:
    documents = documents_over(2, torch.tensor(BOUNDARIES, dtype=torch.int32))
    assert documents is not None and (documents.cu_seqlens, documents.boundaries) == (None, BOUNDARIES)


def test_without_documents_there_is_nothing_to_copy() -> None:
    assert documents_over(1, None) is None and documents_over(2, None) is None


def test_a_moved_batch_leaves_the_boundaries_where_they_are() -> None:
    cu_seqlens = torch.tensor(BOUNDARIES, dtype=torch.int32)
    moved = batch(cu_seqlens).to(META)
    assert moved.cu_seqlens is cu_seqlens and {moved.tokens.device, moved.labels.device, moved.loss_mask.device} == {META}
