"""One call's tokens behind what the memory still holds exactly: who may see whom, and which token is written when.

    extended index   0 ... P-1 | P ............. P+T-1
                     memory's  |  tokens of
                     window    |  this call

Query t stands at P + t. The token it writes to the slots stands W before it. Both must belong to the query's document.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import Memory

_NOT_A_TOKEN = -1  # document number of a window row that the memory does not hold


@dataclass(frozen=True)
class ExtendedSequence:
    """Keys [B, E, H, K], values [B, E, H, V] and log-gates [B, E, H, M] with E = P + T, and their documents.

    Attributes:
        held: P, rows taken from the memory.
        window: W, never None here (a full window is E).
        documents: [B or 1, E] number of each row's document, or None when all rows belong to one document.
        num_documents: how many documents the call names.
        position: [B or 1, T] tokens of its own document that precede each query.
        length: [B or 1] tokens of the last document, earlier calls included.
    """

    keys: Tensor
    values: Tensor
    log_gates: Tensor
    held: int
    window: int
    documents: Tensor | None
    num_documents: int
    position: Tensor
    length: Tensor

    @property
    def query_documents(self) -> Tensor | None:
        return None if self.documents is None else self.documents[:, self.held :]

    def written_tokens(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and log-gates [B, T, H, .] of the token written at each query, or None when this call writes none.

        Where no token of the query's document leaves the window, the entries are zero: decay 1, strength 0.
        """
        num_queries = self.keys.shape[1] - self.held
        missing = self.window - self.held  # leading queries whose window still reaches the start; P <= W, so never negative
        if missing >= num_queries:
            return None
        available = num_queries - missing
        valid = None
        if self.documents is not None:
            valid = self.documents[:, :available] == self.documents[:, self.held + missing :]

        def shifted(rows: Tensor) -> Tensor:
            rows = rows[:, :available]
            if valid is not None:
                rows = torch.where(valid[:, :, None, None], rows, 0.0)
            return torch.cat([rows.new_zeros(rows.shape[0], missing, *rows.shape[2:]), rows], dim=1)

        return shifted(self.keys), shifted(self.values), shifted(self.log_gates)

    def window_tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """The last min(W, E) rows, zero where they do not belong to the last document: the window of the next memory."""
        kept = min(self.window, self.keys.shape[1])
        tail = slice(self.keys.shape[1] - kept, self.keys.shape[1])
        if self.documents is None:
            return self.keys[:, tail], self.values[:, tail], self.log_gates[:, tail]
        belongs = (self.documents[:, tail] == self.num_documents - 1)[:, :, None, None]
        return tuple(torch.where(belongs, rows[:, tail], 0.0) for rows in (self.keys, self.values, self.log_gates))


def extend_sequence(
    k: Tensor, v: Tensor, g: Tensor, *, window: int | None, cu_seqlens: Tensor | None, memory: Memory | None
) -> ExtendedSequence:
    """Put this call's k, v, g behind the memory's window. A memory continues the first document."""
    batch, num_queries = k.shape[:2]
    device = k.device
    held = 0 if memory is None else memory.window_keys.shape[1]
    seen = torch.zeros(1, dtype=torch.int64, device=device) if memory is None else memory.length
    time = torch.arange(num_queries, device=device)

    if cu_seqlens is None:
        num_documents = 1
        documents = torch.zeros(1, num_queries, dtype=torch.int64, device=device)
        position = seen[:, None] + time
        length = seen + num_queries
    else:
        boundaries = cu_seqlens.to(device=device, dtype=torch.int64)
        num_documents = boundaries.shape[0] - 1
        documents = torch.searchsorted(boundaries[1:], time, right=True)[None]
        position = time - boundaries[documents] + torch.where(documents == 0, seen[:, None], 0)
        length = boundaries[-1:] - boundaries[-2:-1] + (seen if num_documents == 1 else 0)

    if memory is not None:
        rows = torch.arange(held, device=device)
        holds = rows >= held - seen[:, None].clamp(max=held)
        documents = torch.cat([torch.where(holds, 0, _NOT_A_TOKEN), documents.expand(batch, -1)], dim=1)

        def behind(memory_rows: Tensor, tokens: Tensor) -> Tensor:  # rows that hold nothing may be anything, so they become zeros
            return torch.cat([torch.where(holds[..., None, None], memory_rows.to(tokens.dtype), 0.0), tokens], dim=1)

        k = behind(memory.window_keys, k)
        v = behind(memory.window_values, v)
        g = behind(memory.window_log_gates, g)

    return ExtendedSequence(
        keys=k,
        values=v,
        log_gates=g,
        held=held,
        window=k.shape[1] if window is None else window,
        documents=None if memory is None and num_documents == 1 else documents,
        num_documents=num_documents,
        position=position,
        length=length,
    )
