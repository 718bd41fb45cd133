"""One micro batch of one rank: tokens, labels, loss mask, document boundaries."""

import dataclasses

import numpy as np
import torch

from nha_megatron.data.packing import PADDING


@dataclasses.dataclass(frozen=True)
class Batch:
    """b rows of L = sequence_length / context-parallel size contiguous tokens; row and position as in the whole sequence.

    tokens, labels: int64 [b, L]; labels are the tokens one place later, also across the edge of a context shard.
    loss_mask: float32 [b, L]; 1 where the label counts, 0 where the input is an end-of-text token, as no document predicts the next, and
        at padding, which holds end-of-text tokens too.
    cu_seqlens: int32 [N + 1] or None. Boundaries of the documents in the WHOLE rows laid end to end (b * sequence_length tokens,
        the same on every context-parallel rank), from 0 to b * sequence_length; None when attention crosses documents. On the CPU, also
        after `to`: who needs them elsewhere copies them once for all layers (engine/forward.py).
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor | None

    def to(self, device: torch.device | str) -> "Batch":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "labels", "loss_mask")}
        return dataclasses.replace(self, **moved)


def document_boundaries(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """Where documents begin and end in rows laid end to end: 0, after each end-of-text token, at each row's end.

    The padding at the end of a row is one document of its own, since what stands before it ends with an end-of-text token.

    tokens: [b, S], PADDING where there is none. Returns int32 [N + 1], strictly increasing, first 0, last b * S.
    """
    rows, length = tokens.shape
    assert tokens.size < 2**31, "cu_seqlens are 32-bit: use fewer rows per micro batch"
    after_end = np.flatnonzero(tokens.reshape(-1) == end_of_text) + 1
    row_edges = np.arange(rows + 1) * length
    return np.union1d(after_end, row_edges).astype(np.int32)


def make_batch(samples: np.ndarray, end_of_text: int, *, isolate_documents: bool, cp_rank: int = 0, cp_size: int = 1) -> Batch:
    """The context shard `cp_rank` of `cp_size` of a micro batch.

    samples: int64 [b, S + 1], PADDING at the end of a row where there is no token. Rank r owns positions
        [r S / cp_size, (r + 1) S / cp_size) of every row.
    """
    inputs, labels = samples[:, :-1], samples[:, 1:]
    length = inputs.shape[1]
    assert length % cp_size == 0 and 0 <= cp_rank < cp_size
    shard = slice(cp_rank * (length // cp_size), (cp_rank + 1) * (length // cp_size))
    boundaries = document_boundaries(inputs, end_of_text) if isolate_documents else None
    inputs, labels = (np.where(tokens[:, shard] == PADDING, end_of_text, tokens[:, shard]) for tokens in (inputs, labels))
    return Batch(
        tokens=torch.from_numpy(inputs),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy((inputs != end_of_text).astype(np.float32)),
        cu_seqlens=None if boundaries is None else torch.from_numpy(boundaries),
    )
