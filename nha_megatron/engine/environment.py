"""What a launcher told this process, read in one place and checked: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

Without torch: the command line looks here before it loads anything.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from dataclasses import dataclass

from nha_megatron.config.errors import OneRankError

_MEETING = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_REMEDY = "Start the run with launch/torchrun.sh or another launcher, which sets all of them, or unset them to run as one process"

_FEWEST_OPEN_FILES = 256
_MOST_OPEN_FILES = 65536


@dataclass(frozen=True)
class Place:
    """This process among those of its run; without a launcher the only one."""

    rank: int
    world_size: int
    local_world_size: int
    """Processes of this host."""


def read_place() -> Place:
    """Raises `OneRankError` for variables that are no numbers. Whether they fit each other is for `meeting_place` to say."""
    local_rank()
    return Place(_number("RANK", 0), _number("WORLD_SIZE", 1, least=1), _number("LOCAL_WORLD_SIZE", 1, least=1))


def meeting_place() -> Place | None:
    """Where this process joins the others, or None when it is the only one and no launcher started it.

    Raises `OneRankError` when variables are missing or do not fit each other, or when MASTER_ADDR means nothing on this host: the ranks
    would look for it until a timeout of many minutes.
    """
    place = read_place()
    if "RANK" not in os.environ:
        if place.world_size == 1:
            return None
        raise OneRankError(
            f"WORLD_SIZE is {place.world_size}, but RANK is not set: which of the {place.world_size} processes is this? {_REMEDY}"
        )
    absent = [name for name in _MEETING if not os.environ.get(name)]
    if absent:
        raise OneRankError(f"the environment variable RANK is set, but {', '.join(absent)} not. {_REMEDY}")
    _number("MASTER_PORT", 0, most=65535)
    if place.rank >= place.world_size:
        raise OneRankError(
            f"RANK is {place.rank} and WORLD_SIZE {place.world_size}: ranks are counted from 0 to {place.world_size - 1}. {_REMEDY}"
        )
    require_resolves(os.environ["MASTER_ADDR"], "MASTER_ADDR", "give a name that DNS or /etc/hosts knows, or an address")
    return place


def local_rank(default: int = 0) -> int:
    """Number of this process on its host; raises `OneRankError` when LOCAL_RANK is no number."""
    return _number("LOCAL_RANK", default)


def require_resolves(host: str, what: str, remedy: str) -> None:
    """Raises `OneRankError` when the name, or address, means nothing on this host."""
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:  # UnicodeError: an empty label, or one of more than 63 characters
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OneRankError(f"{what} {host!r} does not resolve on {socket.gethostname()} ({reason}): {remedy}") from None


def require_open_files() -> None:
    """Raises the limit of open files to what the system allows; raises `OneRankError` where that is too few to meet other ranks.

    Every process group holds a connection to each of its ranks, so that a large run needs more than the usual 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MOST_OPEN_FILES if hard == unlimited else min(hard, _MOST_OPEN_FILES)
    if soft != unlimited and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft != unlimited and soft < _FEWEST_OPEN_FILES:
        raise OneRankError(
            f"this process may open {soft} files, a rank needs at least {_FEWEST_OPEN_FILES}: raise the limit (ulimit -n 4096, "
            "LimitNOFILE of a service, --ulimit nofile of a container)"
        )


def _number(name: str, default: int, least: int = 0, most: int = 10**9) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 11 and least <= int(text) <= most):
        allowed = f"a whole number from {least}" + (f" to {most}" if most < 10**9 else "")
        raise OneRankError(f"the environment variable {name} is {text!r}, must be {allowed}. {_REMEDY}")
    return int(text)
