"""Exit statuses of `nha-megatron`, and how they pass launchers that swallow them.

    0    complete
    1    failed: a rank that stopped moving, the machine; `verify`: a checkpoint is damaged
    2    a user's mistake, one message on standard error
    3    given up: losses or gradients that are not finite, or a loss spike (training/guards.py). The checkpoints from before are untouched;
         started again unchanged, the run would meet the same numbers
    75   stopped on request and saved (a signal; sysexits.h calls it EX_TEMPFAIL): start the same command again to continue

torchrun restarts all ranks when one exits with anything but 0, and returns 1 for every failure; DeepSpeed's launcher returns 0
when a rank was killed. So the scripts of cluster/ name a file in NHA_EXIT_NOTE, a process that ended as all ranks agreed to (0, 3, 75, the
verdict of a health check) writes its status there and exits with 0, and the script returns what the file says.
"""

import os
from pathlib import Path

COMPLETE = 0
FAILED = 1
USER_ERROR = 2
GIVEN_UP = 3
STOPPED = 75

NOTE = "NHA_EXIT_NOTE"


def pass_on(status: int) -> int:
    """What the process exits with: `status`, or 0 with `status` left in the launcher's note. All ranks of a node leave the same note."""
    note = os.environ.get(NOTE)
    if note is None:
        return status
    Path(note).write_text(f"{status}\n")
    return COMPLETE
