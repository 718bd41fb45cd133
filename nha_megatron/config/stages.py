"""Stages of a run: from a token offset on another length, batch, blend or learning-rate schedule.

    tokens  0 ------------------------- from_tokens ----------- from_tokens -------->
    stage   |  1: the sections themselves  |  2: stages[0]        |  3: stages[1]
    steps   |--|--|--|--|--|--|--|--|--|--|----|----|----|----|----|-|-|-|-|-|-|-|

A stage begins with the first step that starts at or after its offset: steps are never cut, so it begins up to one step of the stage
before later than asked. This file is arithmetic and the section; `stage_plan.py` makes the configuration of each stage.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from .base import NonNegative, NonNegativeReal, PathString, Positive, PositiveReal, Section
from .data import Blend

Tokens = Annotated[int, Field(ge=1, lt=2**62)]


class StageSchedule(Section):
    """A learning-rate schedule that begins anew with a stage; fields and defaults are those of section `optimizer`."""

    lr: PositiveReal
    min_lr: NonNegativeReal = 0.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegative = 0
    decay_steps: Positive | None = None


class StageConfig(Section):
    """What changes from a token offset on. What is null stays as it is in the stage before."""

    from_tokens: Tokens
    """Tokens of the run after which the stage begins, more than for the stage before. training.steps counts the steps of all stages."""
    sequence_length: Positive | None = None
    """data.sequence_length."""
    path: PathString | Blend | None = None
    """data.path. Every stage has its own order of samples (from data.seed and the stage's number), and begins with the first of them."""
    packing: Literal["none", "concat", "best_fit"] | None = None
    """data.packing."""
    micro_batch_size: Positive | None = None
    """training.micro_batch_size."""
    global_batch_size: Positive | None = None
    """training.global_batch_size."""
    context: Positive | None = None
    """parallel.context; the world stays, so data parallelism changes against it. The run is saved before the stage and the model built anew
    from there, in the same processes."""
    recompute: Literal["none", "selective", "full"] | None = None
    """training.recompute; the model is built anew, as with `context`."""
    optimizer: StageSchedule | None = None
    """A schedule of its own, from the stage's first step to the last one before the next stage that has its own. null: the schedule of
    the stage before goes on, over the steps of both."""

    def changes(self) -> dict[str, dict[str, Any]]:
        """Given values by section, plain data."""
        data = {name: getattr(self, name) for name in ("sequence_length", "packing") if getattr(self, name) is not None}
        if self.path is not None:
            data["path"] = self.path if isinstance(self.path, str) else [entry.model_dump() for entry in self.path]
        names = ("micro_batch_size", "global_batch_size", "recompute")
        return {
            "parallel": {} if self.context is None else {"context": self.context},
            "data": data,
            "training": {name: getattr(self, name) for name in names if getattr(self, name) is not None},
            "optimizer": {} if self.optimizer is None else self.optimizer.model_dump(),
        }


def first_steps(offsets: Sequence[int], step_tokens: Sequence[int]) -> list[tuple[int, int]]:
    """(steps done, tokens consumed) when each stage begins.

    offsets: token offset of every stage but the first, ascending. step_tokens: tokens of one step of every stage.

    >>> first_steps([100, 200], [30, 40, 50])  # 4 steps of 30 reach 120, 2 of 40 reach 200
    [(0, 0), (4, 120), (6, 200)]
    """
    assert len(step_tokens) == len(offsets) + 1
    begins = [(0, 0)]
    for offset, tokens in zip(offsets, step_tokens, strict=False):
        step, token = begins[-1]
        steps = max(0, -(-(offset - token) // tokens))
        begins.append((step + steps, token + steps * tokens))
    return begins


def begun_stages(config: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """What decides the data position in the stages that have taken a step when `step` steps are done, from a plain resolved configuration.

    A run can be continued by any configuration that gives the same list: later stages may be added, changed or removed.
    """
    data, training = config["data"], config["training"]
    shape = {"sequence_length": data["sequence_length"], "global_batch_size": training["global_batch_size"], "packing": data["packing"]}
    stages = training.get("stages") or []
    shapes = [shape]
    for stage in stages:
        shapes.append({name: value if stage.get(name) is None else stage[name] for name, value in shapes[-1].items()})
    begins = first_steps([stage["from_tokens"] for stage in stages], [s["sequence_length"] * s["global_batch_size"] for s in shapes])
    offsets = [0, *(stage["from_tokens"] for stage in stages)]
    return [
        {"from_tokens": offset, **values}
        for offset, values, (first, _) in zip(offsets, shapes, begins, strict=True)
        if first < step or offset == 0
    ]
