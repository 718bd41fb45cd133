"""What a person sees, on a terminal and in a log file."""

import io

import pytest

from nha_megatron.training.console import Console, duration, progress_line

RECORD = {"step": 120, "loss": 4.21309, "grad_norm": 0.834, "lr": 3e-4, "tokens_per_second": 12345.0, "memory": 3 * 2**30}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_line() -> None:
    line = progress_line({**RECORD, "mfu": 0.412}, 2000, seconds_left=133)
    assert line == "step  120/2000 | loss 4.2131 | grad 0.83 | lr 3.0e-04 | 12.3k tok/s | MFU 41.2% | 3.0 GiB | ETA 2m 13s"


def test_mfu_is_absent_where_the_chip_is_not_known() -> None:
    assert "MFU" not in progress_line(RECORD, 2000, seconds_left=1)


def test_a_log_file_gets_a_line_every_n_steps_and_the_last() -> None:
    stream = io.StringIO()
    console = Console(total_steps=5, every=2, stream=stream)
    for step in range(1, 6):
        console.step({**RECORD, "step": step}, 0)
    console.close()
    assert [line.split("|")[0].strip() for line in stream.getvalue().splitlines()] == ["step 2/5", "step 4/5", "step 5/5"]


def test_a_terminal_gets_one_line_that_changes_and_events_that_stay() -> None:
    stream = Terminal()
    console = Console(total_steps=3, every=1, stream=stream)
    console.step({**RECORD, "step": 1}, 7200)
    console.step({**RECORD, "step": 2}, 5)
    console.event("saved")
    console.close()
    first, second, rest = stream.getvalue().split("\r")[1], stream.getvalue().split("\r")[2].split("\n")[0], stream.getvalue()
    assert len(second) >= len(first)  # a shorter line covers what the longer one left
    assert rest.endswith("\nsaved\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (45, "45s"), (133, "2m 13s"), (3599.7, "1h 00m"), (18420, "5h 07m"), (273600, "3d 04h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
