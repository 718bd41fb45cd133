"""Exit statuses of `nha-megatron`, and how they pass launchers that swallow them.

    0    complete
    1    failed: a rank that stopped moving, the machine; `verify`: a checkpoint is damaged
    2    a user's mistake, one message on standard error
    3    given up: losses or gradients that are not finite, or a loss spike (training/guards.py). The checkpoints from before are untouched;
         started again unchanged, the run would meet the same numbers
    75   stopped on request and saved (a signal; sysexits.h calls it EX_TEMPFAIL): start the same command again to continue
    130  interrupted (SIGINT) before there was anything to save

torchrun restarts all ranks when one exits with anything but 0, and returns 1 for every failure; DeepSpeed's launcher returns 0
when a rank was killed. So the scripts of cluster/ name a file in NHA_EXIT_NOTE, a process that ended as all ranks agreed to (0, 3, 75, the
verdict of a health check) writes its status there and exits with 0, and the script returns what the file says.

Launchers do not wait until ranks have saved either. So the script itself asks the ranks to stop, and knows them by files beside the
note: rank_0.starting holds the process id of local rank 0, is renamed to rank_0.training once the rank can be asked, and to
rank_0.ended-75 when it has left with that status.
"""

import contextlib
import os
from pathlib import Path

COMPLETE = 0
FAILED = 1
USER_ERROR = 2
GIVEN_UP = 3
STOPPED = 75
INTERRUPTED = 130

NOTE = "NHA_EXIT_NOTE"


def announce_start() -> None:
    """Tells the launch script, if there is one, which process this local rank is; a rank that is started again replaces its dead one."""
    if NOTE not in os.environ:
        return
    place = _place("starting")
    with contextlib.suppress(OSError):  # without its place a rank trains all the same, and a signal to it still stops the run
        aside = place.with_name(f".{place.name}")
        aside.write_text(f"{os.getpid()}\n")
        before = list(place.parent.glob(f"{place.stem}.*"))
        aside.replace(place)
        for path in before:
            if path != place:
                path.unlink()


def announce_training() -> None:
    """From here on SIGUSR1 asks this process to save and stop."""
    _rename("starting", "training")


def pass_on(status: int) -> int:
    """What the process exits with: `status`, or 0 with `status` left in the launcher's note. All ranks of a node leave the same note."""
    note = os.environ.get(NOTE)
    if note is None:
        return status
    try:
        Path(note).write_text(f"{status}\n")
    except OSError:  # a full disk: the launcher's own reading of the status is better than a traceback
        return status
    _rename("training", f"ended-{status}")
    return COMPLETE


def _place(state: str) -> Path:
    return Path(os.environ[NOTE]).with_name(f"rank_{os.environ.get('LOCAL_RANK', '0')}.{state}")


def _rename(before: str, after: str) -> None:
    if NOTE in os.environ:
        with contextlib.suppress(OSError):  # also: in that state already, at the second phase of a run
            _place(before).rename(_place(after))
