"""Backward through the slots, slab by slab from the end of the sequence; the slots of a slab are computed again."""

from torch import Tensor

from .backward_reads import backward_reads
from .backward_writes import backward_writes
from .problem import Gradients, Problem, empty_gradients
from .states import SegmentStarts, empty_states, scan_slab, slabs


def backward_slots(
    problem: Problem, starts: SegmentStarts, out: Tensor, lse: Tensor, d_out: Tensor, d_final: Tensor | None
) -> tuple[Gradients, Tensor]:
    """Gradients of queries, written keys, written values and gates, and of the slots before the first token [B*H, M, K+V+1]."""
    parts = slabs(problem, starts, problem.tiles.backward_slab)
    states = empty_states(problem, parts[0].chunks)
    gradients = empty_gradients(problem, lse, parts[0].chunks)
    uses_log = d_final is not None or problem.options.empty_slots == "weight"
    d_slots = d_final
    for slab in reversed(parts):
        scan_slab(problem, starts, slab, states)
        backward_reads(problem, slab, states, out, lse, d_out, gradients)
        d_slots = backward_writes(problem, slab, states, gradients, d_slots, uses_log=uses_log)
    assert d_slots is not None
    return gradients, d_slots
