"""Which implementation serves a call: one table for all five public operations.

    operation      what is asked for                         reference   torch   triton
    attention      `nha_attention`, `hybrid_attention`           x         x       x
    continuation   `continue_attention`                                            x
    decode         `nha_decode_step`                                               x
    summary        `slot_summary`, `summarise_slots`                       x       x
    statistics     `attention_statistics`                                  x

Continuations and decode steps that no implementation of their own serves go through the attention of the backend that was asked for.
`nha_kernels/__init__.py` registers what is not plain PyTorch: this module and what it imports must stay so, because exported Hugging Face
models carry its source.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from .chunked import chunked_attention, log_sum_exps
from .memory import Memory
from .options import AttentionOptions
from .reference import reference_attention

Operation = Literal["attention", "continuation", "decode", "summary", "statistics"]


class Implementation(Protocol):
    """Attention, as a backend provides it: with checked arguments, clamped gates, at least one token; it always returns the memory."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, options: AttentionOptions, *, cu_seqlens: Tensor | None, memory: Memory | None
    ) -> tuple[Tensor, Memory]: ...


@dataclass(frozen=True)
class Backend:
    """`load` returns the implementation. `refuses`, where `auto` may choose the backend, says why it does not serve a call, or None."""

    load: Callable[[], Any]
    refuses: Callable[..., str | None] | None = None
    handles_gates: bool = False  # clamps the gates itself, and always gives them a gradient


_BACKENDS: dict[Operation, dict[str, Backend]] = {
    "attention": {"reference": Backend(lambda: reference_attention), "torch": Backend(lambda: chunked_attention)},
    "continuation": {},
    "decode": {},
    "summary": {},
    "statistics": {"torch": Backend(lambda: log_sum_exps)},
}


def register_backend(
    name: str,
    load: Callable[[], Any],
    refuses: Callable[..., str | None] | None = None,
    *,
    operation: Operation = "attention",
    handles_gates: bool = False,
) -> None:
    """Offer a further implementation of an operation. `load` returns it and is called when it is used, so its imports can wait.

    With `refuses`, the reason why it does not serve a call or None, `auto` takes it for the calls that it serves. Its arguments are
    (q, k, v, g, window) for attention, continuation and statistics, (q, k, v, g, memory) for decode, and (k, v, g) for summary.
    """
    _BACKENDS[operation][name] = Backend(load, refuses, handles_gates)


def choose_backend(operation: Operation, backend: str, *call: Any) -> Backend | None:
    """The one that serves a call (the arguments of `refuses`). None: the operation goes through attention.

    Raises:
        ValueError: the backend that was asked for does not exist, or refuses the call.
    """
    offered = _BACKENDS[operation]
    if backend == "auto":
        for candidate in offered.values():
            if candidate.refuses is not None and candidate.refuses(*call) is None:
                return candidate
        return offered.get("torch")
    if backend in offered:
        chosen = offered[backend]
        reason = None if chosen.refuses is None else chosen.refuses(*call)
        if reason is not None:
            what = "decode step" if operation == "decode" else "call"
            raise ValueError(f"backend={backend!r} does not serve this {what}: {reason}. Use backend='auto'")
        return chosen
    names = _BACKENDS["attention"]
    if backend not in names:
        raise ValueError(f"backend={backend!r}: allowed are 'auto', {', '.join(map(repr, names))}")
    return None
