"""One owner at a time: a lock file that works on network file systems and survives its owner's death.

    with Lock(folder / ".lock", "another run writes into this folder"):
        ...

The file names its owner: host, process id, when that process started, and when the lock was taken. It appears in one step with its content
(a hard link, which network file systems make atomically too), and its owner renews its time stamp every 15 seconds.

Who meets a lock takes it over when its owner is dead:
- on this host: there is no process with that id and that start;
- on another host: the time stamp has not moved for two minutes, by the file system's clock. A lock that may be of that kind is watched
  until it moves (its owner lives: refused) or that time has passed.
A lock whose owner lives is refused at once. The file is small and may be removed by hand when no process uses what it guards.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

from nha_megatron.config import ConfigError

RENEW_SECONDS = 15.0
STALE_SECONDS = 120.0
_POLL_SECONDS = 2.0


class LockedError(ConfigError):
    """Somebody else holds the lock."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `start` and `space` tell a process from a later one with its id: start in clock ticks since boot, boot and process
    namespace (containers have their own)."""

    host: str
    pid: int
    start: int
    space: str
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        return cls(
            platform.node(), os.getpid(), _start_of(os.getpid()) or 0, _space(), time.strftime("%Y-%m-%d %H:%M:%S"), uuid.uuid4().hex
        )

    @property
    def is_here(self) -> bool:
        """Whether this host's process table can tell if the owner lives."""
        return self.host == platform.node() and self.space == _space()

    @property
    def rebooted(self) -> bool:
        """Whether this host has been started again since."""
        return self.host == platform.node() and self.space.partition(" ")[0] != _space().partition(" ")[0]

    def lives_here(self) -> bool:
        """Only for owners that are here."""
        return _start_of(self.pid) == self.start


class Lock:
    """A lock file; a context manager. `what` says in the refusal what the owner does.

    Raises `LockedError` when somebody who lives holds it, `ConfigError` when the folder cannot be written.
    """

    def __init__(self, path: str | Path, what: str) -> None:
        self._path = Path(path)
        self._what = what
        self._owner: Owner | None = None
        self._released = threading.Event()

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def acquire(self) -> None:
        """Returns when the lock is held. Waits up to two minutes for news of an owner on another host."""
        assert self._owner is None, "held already"
        owner = Owner.this_process()
        aside = self._path.with_name(f".{self._path.name}.{owner.token}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _write_durably(aside, json.dumps(asdict(owner)) + "\n")
            try:
                while not _link(aside, self._path):
                    self._take_over(aside, owner)
                    if _read(self._path) == owner:
                        break
            finally:
                aside.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self._path}: the lock cannot be written ({error.strerror}). Choose a folder that can be written"
            ) from error
        self._owner = owner
        self._released.clear()
        threading.Thread(target=self._renew, args=(owner,), name="lock", daemon=True).start()
        atexit.register(self.release)

    def release(self) -> None:
        """Removes the file if it is still this owner's. May be called twice, and by a process that was forked off (which does nothing)."""
        owner, self._owner = self._owner, None
        if owner is None or owner.pid != os.getpid():
            return
        self._released.set()
        atexit.unregister(self.release)
        with suppress(OSError):
            if _read(self._path) == owner:
                self._path.unlink()

    def acquire_and_release(self) -> None:
        """Refuses when somebody holds it, and removes what a dead owner left."""
        self.acquire()
        self.release()

    @property
    def path(self) -> Path:
        """The lock file."""
        return self._path

    @property
    def is_held(self) -> bool:
        """Whether the file still says so: false after somebody took it over, because this process had been still for too long."""
        return self._owner is not None and _read(self._path) == self._owner

    def _renew(self, owner: Owner) -> None:
        while not self._released.wait(RENEW_SECONDS):
            with suppress(OSError):
                if _read(self._path) != owner:
                    return
                os.utime(self._path)

    def _take_over(self, aside: Path, owner: Owner) -> None:
        """Returns when the lock is gone, or `owner` has it. Raises LockedError when its owner lives."""
        found = _read(self._path)
        if found is None:
            if not self._path.exists():
                return
            self._require_still(aside, None)  # not a lock of ours, or damaged: known by its time alone
        elif found.is_here:
            if found.lives_here():
                raise self._refusal(found)
        elif not found.rebooted:
            self._require_still(aside, found)
        # Of all who found this owner dead one may replace it: who makes the file that carries the dead one's token.
        guard = self._path.with_name(f".{self._path.name}.after-{found.token if found else 'none'}")
        if not _link(aside, guard):
            with suppress(FileNotFoundError):
                taker = _read(guard)
                if (taker is not None and taker.is_here and not taker.lives_here()) or self._is_stale(aside, guard):
                    guard.unlink()  # left by one that died while taking over
            time.sleep(0.05)
            return
        try:
            if _read(self._path) == found and self._path.exists():
                again = self._path.with_name(f".{self._path.name}.{owner.token}.new")
                os.link(aside, again)  # `aside` stays for another try
                os.replace(again, self._path)
        finally:
            guard.unlink(missing_ok=True)

    def _require_still(self, aside: Path, found: Owner | None) -> None:
        """Returns when the file has not been renewed for STALE_SECONDS, by the clock of the file system."""
        first = _modified(self._path)
        while first is not None:
            last = _modified(self._path)
            if last != first and last is not None:
                raise self._refusal(found)
            if last is None or self._is_stale(aside, self._path):
                return
            time.sleep(_POLL_SECONDS)

    @staticmethod
    def _is_stale(aside: Path, path: Path) -> bool:
        os.utime(aside)
        now, last = _modified(aside), _modified(path)
        return now is not None and last is not None and now - last > STALE_SECONDS

    def _refusal(self, found: Owner | None) -> LockedError:
        who = "its owner is unknown" if found is None else f"process {found.pid} on {found.host}, since {found.since}"
        return LockedError(f"{self._path}: {self._what} ({who}). Wait for it or end it; if there is no such process, remove the file")


def holder(path: str | Path) -> Owner | None:
    """Who seems to hold a lock, by this host's clock: for a look that must not wait. Only taking a lock decides."""
    found, renewed = _read(Path(path)), _modified(Path(path))
    if found is None or renewed is None or found.rebooted:
        return None
    return found if (found.lives_here() if found.is_here else time.time() - renewed <= STALE_SECONDS) else None


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since boot; None where there is none. 0 on systems that do not say."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0 if not Path("/proc/self/stat").exists() and psutil.pid_exists(pid) else None
    state, *fields = status[status.rindex(")") + 2 :].split()  # the name before may hold spaces and brackets
    return None if state in "ZX" else int(fields[18])


def _link(source: Path, target: Path) -> bool:
    """Whether `target` has been made. A network file system may lose its answer and say that the file exists: the count of links knows."""
    try:
        os.link(source, target)
    except FileExistsError:
        with suppress(OSError):
            return os.path.samefile(source, target)
        return False
    return True


def _read(path: Path) -> Owner | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        owner = Owner(**fields)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return owner if isinstance(owner.pid, int) and isinstance(owner.host, str) and isinstance(owner.space, str) else None


def _modified(path: Path) -> float | None:
    """Opened, not only looked up: a network file system then asks the server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
