"""Two parts of a softmax into one, in place, by their log-sum-exps."""

import triton
import triton.language as tl
from torch import Tensor

from ..common import LENGTHS

_ROWS = 16  # of a program


@triton.jit(do_not_specialize=LENGTHS)
def merge_rows(
    out,  # [N, V] of one part, then of both
    lse,  # [N] likewise
    other_out,  # [N, V]
    other_lse,  # [N]
    constant,  # log-sum-exp of a part whose values are zero, without OTHER
    N,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    OTHER: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    channel = tl.arange(0, WIDTH)
    row_ok = row < N
    at = row[:, None] * V + channel[None, :]
    ok = row_ok[:, None] & (channel < V)[None, :]
    first = tl.load(lse + row, mask=row_ok, other=0.0)
    if OTHER:
        second = tl.load(other_lse + row, mask=row_ok, other=0.0)
    else:
        second = tl.zeros((BN,), tl.float32) + constant
    top = tl.maximum(first, second)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp(first - top) + tl.exp(second - top)
    safe = tl.where(total == 0.0, 1.0, total)
    merged = tl.load(out + at, mask=ok, other=0.0).to(tl.float32) * (tl.exp(first - top) / safe)[:, None]
    if OTHER:
        merged += tl.load(other_out + at, mask=ok, other=0.0).to(tl.float32) * (tl.exp(second - top) / safe)[:, None]
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=ok)
    tl.store(lse + row, top + tl.log(total), mask=row_ok)


def merge_into(out: Tensor, lse: Tensor, other: tuple[Tensor, Tensor] | float) -> None:
    """Put the softmax over two parts into `out` [..., V] and `lse` [...], which held the first. Both are contiguous.

    `other`: output and log-sum-exp of the second part, or the log-sum-exp of one whose values are zero.
    """
    other_out, other_lse = (out, lse) if isinstance(other, float) else other
    assert all(x.is_contiguous() for x in (out, lse, other_out, other_lse))
    merge_rows[(triton.cdiv(lse.numel(), _ROWS),)](
        out,
        lse,
        other_out,
        other_lse,
        other if isinstance(other, float) else 0.0,
        lse.numel(),
        V=out.shape[-1],
        WIDTH=triton.next_power_of_2(out.shape[-1]),
        OTHER=not isinstance(other, float),
        BN=_ROWS,
        num_warps=4,
    )
