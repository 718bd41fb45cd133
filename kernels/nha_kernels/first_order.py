"""Functions that have first derivatives only say so when more is asked for."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order_only(remedy: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the `backward` of an autograd function that is not differentiable itself: raises RuntimeError under `create_graph=True`.

    Not `torch.autograd.function.once_differentiable`: its error stands on a branch that `autograd.grad` does not run, and is absent
    where the incoming gradient is a constant. Second derivatives are then silently wrong.

    Args:
        remedy: what to do instead, as a sentence without full stop.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def checked(ctx: Any, *gradients: Any) -> Any:
            if torch.is_grad_enabled():  # in a backward, this is `create_graph`
                raise RuntimeError(
                    f"{type(ctx).__name__.removesuffix('Backward').strip('_')} has first derivatives only, and create_graph=True asks for "
                    f"a gradient that can be differentiated again. {remedy}, or take the gradient without create_graph"
                )
            return backward(ctx, *gradients)

        return checked

    return decorate
