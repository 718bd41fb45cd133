"""metrics.jsonl holds each step once, whatever happened before; a missing wandb is said in one message."""

import json
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from nha_megatron.config import ConfigError, LoggingConfig
from nha_megatron.training.metrics import MetricsLog, flatten, truncate_after


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(directory: Path, numbers: range, resumed_step: int) -> None:
    log = MetricsLog(LoggingConfig(directory=str(directory), tensorboard=False), {}, resumed_step)
    for step in numbers:
        log.write({"step": step, "loss": 1 / step})
    log.close()


def test_a_resumed_run_drops_the_steps_that_it_does_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), resumed_step=0)
    write(tmp_path, range(5, 10), resumed_step=4)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_new_run_in_a_used_folder_starts_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), resumed_step=0)
    write(tmp_path, range(1, 3), resumed_step=0)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_line_torn_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    truncate_after(path, 5)
    assert steps(path) == [1]


def test_losses_survive_the_file_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path, range(1, 20), resumed_step=0)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses == [1 / step for step in range(1, 20)]


def test_tensorboard_gets_scalars_and_one_curve_a_layer(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(LoggingConfig(directory=str(tmp_path), every=2), {}, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float(step), "mean_decay": [0.25, 0.5]})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 2.0)]
    assert [event.value for event in events.Scalars("mean_decay/layer_001")] == [0.5]


def test_flatten_numbers_layers_from_zero() -> None:
    assert flatten({"loss": 1.0, "slot_share": [0.1, 0.2]}) == {"loss": 1.0, "slot_share/layer_000": 0.1, "slot_share/layer_001": 0.2}


def test_wandb_not_installed_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    with pytest.raises(ConfigError, match="pip install wandb"):
        MetricsLog(LoggingConfig(directory=str(tmp_path), tensorboard=False, wandb=True), {}, 0)


@pytest.mark.parametrize("broken", [b'{"step": "7"}', b"\xff\xfe", b"[" * 100_000, b'{"step": ' + b"9" * 6000 + b"}", b'{"step": 7.5}'])
def test_lines_that_are_no_records_are_dropped_on_resume(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + broken + b'\n{"step": 2, "loss": 1.0}\n')
    write(tmp_path, range(3, 4), resumed_step=2)
    assert steps(path) == [1, 2, 3]


def test_a_full_disk_ends_no_run_and_nothing_is_missing_afterwards(tmp_path: Path) -> None:
    said: list[str] = []
    log = MetricsLog(LoggingConfig(directory=str(tmp_path), tensorboard=False), {}, 0, said.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 30):
        if step in (5, 20):  # a file may not grow beyond that, as on a full disk: in the middle of a line
            resource.setrlimit(resource.RLIMIT_FSIZE, ((200, before[1]) if step == 5 else before))
        try:
            log.write({"step": step, "loss": 1 / step})
        except BaseException:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            raise
    log.close()
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 30))
    assert len(said) == 2 and "metrics.jsonl cannot be written" in said[0] and said[1] == "step 20: metrics.jsonl is written again"


def test_tensorboard_that_fails_catches_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    log = MetricsLog(LoggingConfig(directory=str(tmp_path)), {}, 0)
    for step in range(1, 6):
        with monkeypatch.context() as patch:
            if step == 3:
                patch.setattr(SummaryWriter, "add_scalar", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "no space")))
            log.write({"step": step, "loss": float(step)})
    log.close()
    # The files of the two writers lie side by side, and what was not known to be on disk was sent again.
    events = [EventAccumulator(str(path)).Reload().Scalars("loss") for path in (tmp_path / "tensorboard").iterdir()]
    assert {event.step for scalars in events for event in scalars} == {1, 2, 3, 4, 5}


def test_wandb_offline_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = SimpleNamespace(init=Mock(), errors=SimpleNamespace(Error=RuntimeError))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    MetricsLog(LoggingConfig(directory=str(tmp_path), tensorboard=False, wandb="offline"), {}, 0).close()
    assert wandb.init.call_args.kwargs["mode"] == "offline"
    wandb.init.side_effect = RuntimeError("no API key")
    with pytest.raises(ConfigError, match=r"no API key; set logging\.wandb=offline"):
        MetricsLog(LoggingConfig(directory=str(tmp_path), tensorboard=False, wandb=True), {}, 0)
