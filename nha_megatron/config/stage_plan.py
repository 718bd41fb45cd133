"""The configuration of each stage of a run, and when it holds."""

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .messages import validation_messages
from .stages import first_steps

if TYPE_CHECKING:
    from .run import RunConfig


@dataclass(frozen=True)
class Stage:
    """One stage. Steps are optimizer steps of the whole run, counted from 1; its first is `steps_before + 1`."""

    number: int
    """From 1."""
    config: "RunConfig"
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


def plan_stages(config: "RunConfig") -> tuple[Stage, ...]:
    """The stages of a valid run in their order; a run without `training.stages` is one stage."""
    plan = _plan(config)
    assert not isinstance(plan, list), plan
    return plan


def plan_phases(config: "RunConfig") -> tuple[tuple[Stage, ...], ...]:
    """The stages, grouped into runs of neighbours that one built model serves: same parallel sizes, same recomputation."""
    groups = groupby(plan_stages(config), key=lambda stage: (stage.config.parallel, stage.config.training.recompute))
    return tuple(tuple(stages) for _, stages in groups)


def stage_at(config: "RunConfig", step: int) -> Stage:
    """The stage whose values a run has that has done `step` steps: the one of its last step."""
    return next(stage for stage in plan_stages(config) if step <= stage.last_step or stage.last_step == config.training.steps)


def stage_problems(config: "RunConfig") -> list[str]:
    """Everything that is wrong with the stages of a run whose sections are valid by themselves."""
    plan = _plan(config)
    return plan if isinstance(plan, list) else []


def _plan(config: "RunConfig") -> tuple[Stage, ...] | list[str]:
    """The stages, or what is wrong with them."""
    entries = config.training.stages or []
    if not entries:
        return (Stage(1, config, 0, config.training.steps, 0, 0),)
    values = _values_of_stages(config)
    begins = first_steps(
        [entry.from_tokens for entry in entries],
        [value["data"]["sequence_length"] * value["training"]["global_batch_size"] for value in values],
    )
    problems = _order_problems(config, begins)
    if problems:
        return problems

    ends = [step for step, _ in begins[1:]] + [config.training.steps]
    # A schedule lasts from the stage that brings it to the next that brings one.
    bringing = [0] + [number for number, entry in enumerate(entries, 1) if entry.optimizer is not None]
    stages = []
    for index, (step, token) in enumerate(begins):
        brought = max(number for number in bringing if number <= index)
        schedule_end = min((begins[number][0] for number in bringing if number > index), default=config.training.steps)
        values[index]["training"]["steps"] = schedule_end - begins[brought][0]
        try:
            valid = type(config).model_validate(values[index])
        except ValidationError as error:
            where = f"training.stages.{index - 1}" if index else "before training.stages.0"
            # In a stage's own values training.steps is the length of its schedule.
            messages = [message.replace("training.steps", "its schedule's steps") for message in validation_messages(error, type(config))]
            problems += [f"{where}: {message}" for message in messages]
            continue
        stages.append(Stage(index + 1, valid, step, ends[index] - step, token, begins[brought][0]))
    return problems or tuple(stages)


def _values_of_stages(config: "RunConfig") -> list[dict[str, Any]]:
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


def _order_problems(config: "RunConfig", begins: list[tuple[int, int]]) -> list[str]:
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
