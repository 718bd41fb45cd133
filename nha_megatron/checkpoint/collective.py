"""Steps that one rank does for all, and what all ranks must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from nha_megatron.checkpoint.files import CheckpointError, reason_of

_T = TypeVar("_T")


def on_rank_zero(failure: str, action: Callable[[], _T], group: dist.ProcessGroup) -> _T:
    """Runs `action` on rank 0 of `group`; all its ranks return what it returned, or raise `CheckpointError` with `failure` and the reason.

    What is not an OSError is raised as it is on rank 0. The result is pickled: plain data.
    """
    outcome: list[Any] = [None, None]
    unexpected: Exception | None = None
    if group.rank() == 0:
        try:
            outcome[1] = action()
        except CheckpointError as error:
            outcome[0] = str(error)
        except OSError as error:
            outcome[0] = f"{failure}: {reason_of(error)}"
        except Exception as error:  # the others must not wait for a rank that has left
            outcome[0], unexpected = f"{failure}: {type(error).__name__}: {error}", error
    dist.broadcast_object_list(outcome, group_src=0, group=group)
    problem, result = outcome
    if unexpected is not None:
        raise unexpected
    if problem is not None:
        raise CheckpointError(problem)
    return cast(_T, result)


def sum_over_ranks(values: list[int], device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """Each number summed over the ranks of `group`."""
    total = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=group)
    return [int(number) for number in total.tolist()]
