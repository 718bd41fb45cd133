"""One call, described for the kernels: tensors, sizes, and the tile sizes that dispatch chose."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...conventions import EMPTY_SLOTS
from ...options import AttentionOptions
from ..architectures.tiles import Tiles


class Slab(NamedTuple):
    """Consecutive chunks whose slots are in device memory at the same time, so that this memory does not grow with the sequence."""

    first: int
    chunks: int


@dataclass(frozen=True)
class Problem:
    """Contiguous tensors: q [B, T, HQ, K]; k [B, E, H, K], v [B, E, H, V], g [B, E, H, M] with the memory's `held` rows in front.

    `start` is the extended row at which a query's document begins: None (row 0), [B], or [B, T] (`docs` 0, 1, 2).
    `attend_window` is False where another kernel attends to the window: then only the slots are read here.
    `window` is a number, and no larger than it needs to be; `options.window` is what was asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    start_or_none: Tensor | None
    cos: Tensor | None  # [offsets, K / 2], by distance from the first row of a tile
    sin: Tensor | None
    options: AttentionOptions
    held: int
    window: int
    attend_window: bool
    tiles: Tiles

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.q.shape[1]

    @property
    def num_rows(self) -> int:
        return self.k.shape[1]

    @property
    def query_heads(self) -> int:
        return self.q.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def key_dim(self) -> int:
        return self.k.shape[3]

    @property
    def value_dim(self) -> int:
        return self.v.shape[3]

    @property
    def num_slots(self) -> int:
        return self.g.shape[3]

    @property
    def scale(self) -> float:
        return self.options.logit_scale(self.key_dim)

    @property
    def rotated_pairs(self) -> int:
        return 0 if self.options.rope is None or not self.attend_window else self.options.rope.shape[0]

    @property
    def C(self) -> int:
        return self.tiles.chunk

    @property
    def BM(self) -> int:
        return self.tiles.slots

    @property
    def num_chunks(self) -> int:
        return -(-self.num_tokens // self.C)

    @property
    def start(self) -> Tensor:
        return self.g if self.start_or_none is None else self.start_or_none  # never read with DOCS = 0

    @property
    def angles(self) -> tuple[Tensor, Tensor]:
        if self.cos is None or self.sin is None:
            return self.g, self.g  # never read without rotation
        return self.cos, self.sin

    @property
    def DOCS(self) -> int:
        return 0 if self.start_or_none is None else self.start_or_none.dim()

    @property
    def EMPTY(self) -> int:
        return EMPTY_SLOTS.index(self.options.empty_slots)

    @property
    def GATE_FLOOR(self) -> float:
        return -64.0 / (self.tiles.block // 2)

    @property
    def sums_delta_over_slots(self) -> bool:
        """Whether <d_out, out> is summed over the slots, where they are all that queries see, and not taken from an output of 16 bits."""
        return self.attend_window and self.window == 0 and self.q.dtype != torch.float32

    def tile_constants(self, names: str) -> dict[str, Any]:
        """Compile-time arguments of a kernel, by name."""
        group = self.query_heads // self.kv_heads
        constants = {
            "H": self.kv_heads,
            "R": group,
            "RP": 1 << (group - 1).bit_length(),
            "K": self.key_dim,
            "V": self.value_dim,
            "M": self.num_slots,
            "C": self.C,
            "BLOCK": self.tiles.block,
            "BM": self.BM,
            "BN": self.tiles.window_rows,
            "HALF": self.rotated_pairs or self.key_dim // 2,
            "GATE_FLOOR": self.GATE_FLOOR,
            "EMPTY": self.EMPTY,
            "DOCS": self.DOCS,
            "ONE_BLOCK": self.DOCS != 2 and self.C == self.tiles.block == 16,
            "ROPE": self.cos is not None,
            "WINDOW": self.attend_window and self.window > 0,
            "SLOTS_ALONE": self.sums_delta_over_slots,
        }
        return {name: constants[name] for name in names.split()}


@dataclass(frozen=True)
class Gradients:
    """What the backward kernels hand to each other."""

    q: Tensor
    delta: Tensor  # [B, T, HQ] <d_out, out>, for the window; not written without one
    states: Tensor  # [B*H, N, M, K+V] gradient of the slots of a slab: before each chunk, then (composed) after it
    logs: Tensor  # [B*H, N, M] the same of the sum of log-gates
    keys: Tensor  # [B, E, H, K] gradient through the slots; rows that were never written are not touched. The window adds its part
    values: Tensor  # [B, E, H, V]
    gates: Tensor  # [B, E, H, M]


def empty_gradients(problem: Problem, lse: Tensor, slab_chunks: int) -> Gradients:
    """For slabs of at most `slab_chunks`. Gates that are never written have gradient zero; so have keys and values, where no window kernel
    adds to them."""
    p = problem
    heads = p.batch * p.kv_heads
    wide = torch.bfloat16 if p.q.dtype == torch.float16 else p.q.dtype
    through_slots = torch.empty_like if p.attend_window and p.window > 0 else torch.zeros_like
    return Gradients(
        q=torch.empty_like(p.q),
        delta=torch.empty_like(lse),
        states=p.q.new_empty(heads, slab_chunks, p.num_slots, p.key_dim + p.value_dim, dtype=wide),
        logs=lse.new_empty(heads, slab_chunks, p.num_slots),
        keys=through_slots(p.k),
        values=through_slots(p.v),
        gates=torch.zeros_like(p.g),
    )
