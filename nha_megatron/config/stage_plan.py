"""The configuration of each stage of a run, and when it holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, Protocol, Self, TypeVar

from pydantic import BaseModel, ValidationError

from .data import DataConfig
from .errors import raise_problems
from .messages import validation_messages
from .parallel import ParallelConfig
from .stages import first_steps
from .training import TrainingConfig


class Sections(Protocol):
    """What a configuration has that is cut into stages: `RunConfig`, which asks this module."""

    data: DataConfig
    parallel: ParallelConfig
    training: TrainingConfig

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...

    @classmethod
    def model_validate(cls, obj: Any) -> Self: ...


Config = TypeVar("Config", bound=Sections)


@dataclass(frozen=True)
class Stage(Generic[Config]):
    """One training stage. Steps are optimizer steps of the whole run, counted from 1; its first is `steps_before + 1`."""

    number: int
    """From 1."""
    config: Config
    """The run with this stage's values, without stages; `training.steps` is the length of the schedule it takes part in."""
    steps_before: int
    steps: int
    tokens_before: int
    schedule_begins: int
    """Steps before the first one of the learning-rate schedule that holds in this stage."""

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.global_batch_size * self.config.data.sequence_length

    @property
    def last_step(self) -> int:
        return self.steps_before + self.steps

    @property
    def tokens_after(self) -> int:
        return self.tokens_before + self.steps * self.tokens_per_step

    def tokens_at(self, step: int) -> int:
        """Tokens of the run when `step` steps are done, one of this stage's."""
        assert self.steps_before <= step <= self.last_step
        return self.tokens_before + (step - self.steps_before) * self.tokens_per_step


def group_into_phases(stages: Iterable[Stage[Config]]) -> tuple[tuple[Stage[Config], ...], ...]:
    """Runs of neighbours with the same parallel sizes and recomputation."""
    groups = groupby(stages, key=lambda stage: (stage.config.parallel, stage.config.training.recompute))
    return tuple(tuple(phase) for _, phase in groups)


def plan_stages(config: Config) -> tuple[Stage[Config], ...]:
    """The stages of a run whose sections are valid by themselves. Raises `ConfigError` with everything that is wrong with them."""
    entries = config.training.stages or []
    if not entries:
        return (Stage(1, config, 0, config.training.steps, 0, 0),)
    values = _values_of_stages(config)
    begins = first_steps(
        [entry.from_tokens for entry in entries],
        [value["data"]["sequence_length"] * value["training"]["global_batch_size"] for value in values],
    )
    raise_problems(_order_problems(config, begins))

    ends = [step for step, _ in begins[1:]] + [config.training.steps]
    schema = type(config)
    assert issubclass(schema, BaseModel)
    # A schedule lasts from the stage that brings it to the next that brings one.
    bringing = [0] + [number for number, entry in enumerate(entries, 1) if entry.optimizer is not None]
    stages, problems = [], []
    for index, (step, token) in enumerate(begins):
        brought = max(number for number in bringing if number <= index)
        schedule_end = min((begins[number][0] for number in bringing if number > index), default=config.training.steps)
        values[index]["training"]["steps"] = schedule_end - begins[brought][0]
        try:
            valid = schema.model_validate(values[index])
        except ValidationError as error:
            where = f"training.stages.{index - 1}" if index else "before training.stages.0"
            # In a stage's own values training.steps is the length of its schedule.
            messages = [message.replace("training.steps", "its schedule's steps") for message in validation_messages(error, schema)]
            problems += [f"{where}: {message}" for message in messages]
            continue
        stages.append(Stage(index + 1, valid, step, ends[index] - step, token, begins[brought][0]))
    raise_problems(problems)
    return tuple(stages)


def _values_of_stages(config: Sections) -> list[dict[str, Any]]:
    """Plain values of every stage, each with the changes of all before it."""
    plain = config.model_dump(mode="json")
    plain["training"]["stages"] = None
    values = [plain]
    for entry in config.training.stages or []:
        changes = entry.changes()
        values.append({name: {**section, **changes.get(name, {})} for name, section in values[-1].items()})
    for value in values:
        if value["training"]["recompute"] != "full":  # said for the stages that do recompute layers
            value["training"] = value["training"] | {"recompute_layers": None}
    return [{name: dict(section) for name, section in value.items()} for value in values]


def _order_problems(config: Sections, begins: list[tuple[int, int]]) -> list[str]:
    """Offsets that do not ascend, stages without a step, stages after the end of the run."""
    problems = []
    entries = config.training.stages or []
    for index, entry in enumerate(entries):
        before, offset = entries[index - 1].from_tokens if index else 0, entry.from_tokens
        if offset <= before:
            problems.append(
                f"training.stages.{index}.from_tokens {offset:,} is not after that of the stage before, {before:,}; sort the stages"
            )
        elif index and begins[index + 1][0] == begins[index][0]:
            problems.append(
                f"training.stages.{index}.from_tokens {offset:,}: the stage before begins with a whole step at token "
                f"{begins[index][1]:,}, so it would have no step; move the stages apart"
            )
    step, token = begins[-1]
    if not problems and step >= config.training.steps:
        problems.append(
            f"training.stages.{len(entries) - 1} begins after step {step:,} (token {token:,}), but training.steps is "
            f"{config.training.steps:,} for all stages together; raise training.steps or remove the stage"
        )
    return problems
