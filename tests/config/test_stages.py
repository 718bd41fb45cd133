"""Stages: when they begin, what holds in each, and which are refused. No ranks, no data."""

import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_megatron.config import ConfigError, parse_config
from nha_megatron.config.stages import begun_stages, first_steps
from nha_megatron.estimate.report import check_report
from tests.config.cases import run

# The small run takes 8 x 128 = 1024 tokens a step, for 10 steps.
STEP = 1024


def staged(*stages: dict[str, Any], **sections: dict[str, Any]) -> Any:
    return run(**{**sections, "training": {**sections.get("training", {}), "stages": list(stages)}})


runs_of_offsets = st.lists(st.tuples(st.integers(1, 10**13), st.integers(1, 10**8)), min_size=0, max_size=6)


@given(runs_of_offsets, st.integers(1, 10**8))
def test_a_stage_begins_with_the_first_step_at_or_after_its_offset(entries: list[tuple[int, int]], first_tokens: int) -> None:
    offsets = sorted(offset for offset, _ in entries)
    sizes = [first_tokens, *(tokens for _, tokens in entries)]
    begins = first_steps(offsets, sizes)
    assert begins[0] == (0, 0) and len(begins) == len(sizes)
    for index, offset in enumerate(offsets):
        (step_before, token_before), (step, token) = begins[index], begins[index + 1]
        assert token >= offset
        assert token - token_before == (step - step_before) * sizes[index]
        # One step fewer would not have reached it.
        assert step == step_before or token - sizes[index] < offset


@settings(deadline=None, max_examples=40)  # each example validates configurations
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4, unique_by=lambda entry: entry[0]), st.integers(1, 9)
)
def test_the_plan_is_what_counting_step_by_step_gives(entries: list[tuple[int, int]], first: int) -> None:
    """Offsets in units of 128 tokens, batches in samples of 128 tokens."""
    entries = sorted(entries)
    stages = [{"from_tokens": 128 * offset, "global_batch_size": batch} for offset, batch in entries]
    try:
        config = staged(*stages, training={"steps": 60, "micro_batch_size": 1, "global_batch_size": first})
    except ConfigError as error:
        assert "it would have no step" in str(error)
        return
    plan = config.stages
    tokens = 0
    for step in range(1, 61):
        # The stage of a step: the last one whose offset has been reached when it starts.
        number = 1 + sum(tokens >= 128 * offset for offset, _ in entries)
        batch = [first, *(batch for _, batch in entries)][number - 1]
        stage = next(stage for stage in plan if step <= stage.last_step)
        assert (stage.number, stage.config.training.global_batch_size) == (number, batch)
        tokens += 128 * batch
        assert stage.tokens_at(step) == tokens
    assert plan[-1].tokens_after == tokens and sum(stage.steps for stage in plan) == 60


def test_a_run_without_stages_is_one_stage() -> None:
    config = run()
    (stage,) = config.stages
    assert stage.config is config and (stage.steps_before, stage.steps, stage.tokens_after) == (0, 10, 10 * STEP)


def test_the_stage_of_a_run_that_has_done_some_steps() -> None:
    config = staged({"from_tokens": 2 * STEP, "sequence_length": 256})
    # Before the first step the first one; after a step the one that it was of; beyond the end, which a shorter run may be, the last.
    assert [config.stage_at(step).number for step in (0, 1, 2, 3, 10, 11)] == [1, 1, 1, 2, 2, 2]


def test_a_stage_keeps_what_it_does_not_change() -> None:
    blend = [{"path": "data/long", "weight": 1.0}]
    config = staged(
        {"from_tokens": 2 * STEP, "sequence_length": 256, "micro_batch_size": 1},
        {"from_tokens": 6 * STEP, "path": blend, "packing": "best_fit", "global_batch_size": 4},
    )
    one, two, three = (stage.config for stage in config.stages)
    assert (one.data.sequence_length, two.data.sequence_length, three.data.sequence_length) == (128, 256, 256)
    assert (one.training.micro_batch_size, two.training.micro_batch_size, three.training.micro_batch_size) == (2, 1, 1)
    assert (two.training.global_batch_size, three.training.global_batch_size) == (8, 4)
    assert two.data.path == "data/train" and three.data.training_blend[0].path == "data/long"
    assert (two.data.packing, three.data.packing) == ("none", "best_fit")
    assert one.model == two.model == three.model == config.model
    assert all(stage.config.training.stages is None for stage in config.stages)


def test_a_schedule_goes_on_through_stages_until_one_brings_its_own() -> None:
    config = staged(
        {"from_tokens": 2 * STEP, "global_batch_size": 4},
        {"from_tokens": 4 * STEP, "optimizer": {"lr": 1e-4, "warmup_steps": 1}},
        {"from_tokens": 5 * STEP, "global_batch_size": 8},
        optimizer={"lr": 1e-3, "min_lr": 1e-5, "warmup_steps": 3, "betas": [0.8, 0.9]},
    )
    plan = config.stages
    assert [(stage.steps_before, stage.steps) for stage in plan] == [(0, 2), (2, 4), (6, 2), (8, 2)]
    # (step after which the schedule begins, its length): one over the first two stages, one over the others.
    assert [(stage.schedule_begins, stage.config.training.steps) for stage in plan] == [(0, 6), (0, 6), (6, 4), (6, 4)]
    assert [stage.config.optimizer.lr for stage in plan] == [1e-3, 1e-3, 1e-4, 1e-4]
    assert plan[2].config.optimizer.min_lr == 0.0  # a schedule of its own takes nothing over
    assert plan[3].config.optimizer.betas == (0.8, 0.9)  # but what is no schedule stays


def test_a_new_layout_or_recomputation_needs_the_model_built_anew() -> None:
    config = staged(
        {"from_tokens": 2 * STEP, "sequence_length": 256},
        {"from_tokens": 4 * STEP, "context": 2},
        {"from_tokens": 6 * STEP, "sequence_length": 512},
        {"from_tokens": 10 * STEP, "recompute": "full"},
        training={"steps": 20, "recompute_layers": 3},
    )
    assert [[stage.number for stage in phase] for phase in config.phases] == [[1, 2], [3, 4], [5]]
    assert [stage.config.training.recompute_layers for stage in config.stages] == [None] * 4 + [3]
    # Four ranks: four data parallel, later two of them with two context ranks each.
    assert config.check_world(4) == 4
    assert [stage.config.check_world(4) for stage in config.stages] == [4, 4, 2, 2, 2]
    assert "tensor 1 x context 1 x data 2 x pipeline 1, from step 1\n" in check_report(config)  # the fewest ranks that fit all stages
    assert "tensor 1 x context 2 x data 1 x pipeline 1, from step 4\n" in check_report(config)


REFUSED = {
    "context that does not fit the length": (
        [{"from_tokens": 2000, "context": 3}],
        {},
        "training.stages.0: data.sequence_length 128 is not a multiple of parallel.context 3",
    ),
    "not ascending": ([{"from_tokens": 2000}, {"from_tokens": 2000}], {}, "training.stages.1.from_tokens 2,000 is not after"),
    "no step": (
        [{"from_tokens": 1}, {"from_tokens": 1024}],
        {},
        "training.stages.1.from_tokens 1,024: the stage before begins with a whole",
    ),
    "after the end": ([{"from_tokens": 10 * STEP}], {}, "begins after step 10 (token 10,240), but training.steps is 10 for all stages"),
    "context": (
        [{"from_tokens": 2000, "sequence_length": 130}],
        {"parallel": {"context": 4}},
        "training.stages.0: data.sequence_length 130 is not a multiple of parallel.context 4",
    ),
    "batch": (
        [{"from_tokens": 2000, "global_batch_size": 3}],
        {},
        "training.stages.0: training.global_batch_size 3 is not a multiple of training.micro_batch_size 2",
    ),
    "tokens of a micro batch": (
        [{"from_tokens": 2000, "sequence_length": 2**30}],
        {},
        "training.stages.0: training.micro_batch_size 2 x data.sequence_length 1073741824 is 2,147,483,648 tokens",
    ),
    "second stage wrong too": (
        [{"from_tokens": 2000, "global_batch_size": 4}, {"from_tokens": 4000, "micro_batch_size": 8}],
        {},
        "training.stages.1: training.global_batch_size 4 is not a multiple of training.micro_batch_size 8",
    ),
    "first schedule cut short": (
        [{"from_tokens": 2000, "optimizer": {"lr": 1e-4}}],
        {"optimizer": {"warmup_steps": 5}},
        "before training.stages.0: optimizer.warmup_steps is 5, more than its schedule's steps 2",
    ),
    "schedule of a stage": (
        [{"from_tokens": 2000, "optimizer": {"lr": 1e-4, "schedule": "wsd"}}],
        {},
        "training.stages.0: optimizer: schedule wsd needs decay_steps",
    ),
    "unknown key": (
        [{"from_tokens": 2000, "sequence_lenght": 256}],
        {},
        "stages.0.sequence_lenght: unknown key; did you mean 'sequence_length'?",
    ),
    "unknown key of a schedule": (
        [{"from_tokens": 2000, "optimizer": {"lr": 1e-4, "warmup": 5}}],
        {},
        "training.stages.0.optimizer.warmup: unknown key; did you mean 'warmup_steps'?",
    ),
    "no offset": ([{"sequence_length": 256}], {}, "training.stages.0.from_tokens: missing, and it has no default"),
    "offset of 0": ([{"from_tokens": 0}], {}, "training.stages.0.from_tokens: given 0, must be at least 1"),
    "empty list": ([], {}, "training.stages: given [], must have at least 1 entries"),
}


@pytest.mark.parametrize(("stages", "sections", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_a_stage_that_cannot_be_run_is_refused(stages: list[dict[str, Any]], sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        staged(*stages, **sections)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_every_stage_must_fit_the_world() -> None:
    config = staged({"from_tokens": 2000, "global_batch_size": 4})
    assert config.check_world(2) == 2
    with pytest.raises(ConfigError, match="world size 3: must be a multiple of tensor 1 x pipeline 1 x context 2"):
        staged({"from_tokens": 2000, "context": 2}).check_world(3)
    with pytest.raises(
        ConfigError, match=r"training.stages.0: training.global_batch_size 4 is not a multiple of .* data-parallel size 4 = 8"
    ):
        config.check_world(4)


def test_check_describes_every_stage_and_looks_for_its_files() -> None:
    long = {"from_tokens": 4 * STEP, "sequence_length": 256, "path": "data/long", "optimizer": {"lr": 1e-4, "warmup_steps": 2}}
    report = check_report(staged(long, model={"window": "16*3,full"}), 2)
    assert "# stage 2 of 2: batches and messages\n#   steps 5 to 10, tokens 4,096 to 16,384\n" in report
    assert "learning rate: cosine up to 0.0001, warm-up of 2 steps, over steps 5 to 10" in report
    assert "at length 128" in report and "at length 256" in report
    memory = re.findall(r"# stage (\d) of 2: memory of the fullest rank, estimated\n#   ([0-9.]+) MiB", report)
    assert [number for number, _ in memory] == ["1", "2"] and float(memory[1][1]) > float(memory[0][1])
    assert "training.stages.0.path 'data/long': no file data/long.bin" in report
    assert parse_config(yaml.safe_load(report)) == staged(long, model={"window": "16*3,full"})


def begun(config: Any, step: int) -> list[dict[str, Any]]:
    return begun_stages(config.model_dump(mode="json"), step)


def test_a_run_may_be_continued_with_other_stages_that_have_not_begun() -> None:
    plain, long = run(), {"from_tokens": 4 * STEP, "sequence_length": 256}
    saved = staged(long, {"from_tokens": 6 * STEP, "global_batch_size": 4})
    # Step 4 is the last of the first stage: what follows is free.
    assert begun(saved, 4) == begun(plain, 4) and begun(saved, 5) != begun(plain, 5)
    assert begun(saved, 5) == begun(staged(long), 5) and begun(saved, 6) != begun(staged(long), 6)
    # Batches of a rank, and the schedule, may change at any time.
    assert begun(saved, 6) == begun(
        staged({**long, "micro_batch_size": 1, "optimizer": {"lr": 1.0}}, {"from_tokens": 6144, "global_batch_size": 4}), 6
    )
