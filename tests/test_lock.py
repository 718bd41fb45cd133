"""The lock file: one owner, refused while it lives, taken over when it is dead."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nha_megatron import lock
from nha_megatron.lock import Lock, LockedError, Owner


def write_owner(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(asdict(replace(Owner.this_process(), **changes))))  # type: ignore[arg-type]


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ".lock"
    with Lock(path, "somebody works here") as held:
        assert held.is_held
        with pytest.raises(LockedError, match=rf"somebody works here \(process {os.getpid()} on .*remove the file"):
            Lock(path, "somebody works here").acquire()
    assert not held.is_held and list(path.parent.iterdir()) == []
    with Lock(path, "again"):
        pass


def test_of_many_one_takes_a_dead_owners_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    write_owner(path, start=1)  # this process id, but another process
    taken: list[Lock] = []

    def contend() -> None:
        each = Lock(path, "busy")
        try:
            each.acquire()
        except LockedError:
            return
        taken.append(each)

    threads = [threading.Thread(target=contend) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and taken[0].is_held
    taken[0].release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_owner_is_succeeded_at_once(tmp_path: Path) -> None:
    program = (
        "import sys, time; from nha_megatron.lock import Lock; Lock(sys.argv[1], '').acquire(); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(LockedError):
            Lock(tmp_path / ".lock", "busy").acquire()
        process.send_signal(signal.SIGKILL)
    with Lock(tmp_path / ".lock", "busy") as held:
        assert held.is_held


class TestAnotherHost:
    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lock, "STALE_SECONDS", 0.3)
        monkeypatch.setattr(lock, "_POLL_SECONDS", 0.02)

    def test_that_is_silent_is_succeeded(self, tmp_path: Path) -> None:
        write_owner(tmp_path / ".lock", host="elsewhere")
        with Lock(tmp_path / ".lock", "busy") as held:
            assert held.is_held

    def test_that_renews_its_lock_is_left_alone(self, tmp_path: Path) -> None:
        write_owner(tmp_path / ".lock", host="elsewhere")
        renew = threading.Timer(0.1, lambda: os.utime(tmp_path / ".lock"))
        renew.start()
        with pytest.raises(LockedError, match="on elsewhere"):
            Lock(tmp_path / ".lock", "busy").acquire()
        renew.join()
        assert "elsewhere" in (tmp_path / ".lock").read_text()

    def test_a_file_that_names_nobody_is_succeeded_when_it_is_old(self, tmp_path: Path) -> None:
        (tmp_path / ".lock").write_text("[" * 100_000)
        with Lock(tmp_path / ".lock", "busy") as held:
            assert held.is_held


def test_an_owner_from_before_this_host_was_started_again(tmp_path: Path) -> None:
    write_owner(tmp_path / ".lock", space="another-boot pid:[1]")
    with Lock(tmp_path / ".lock", "busy") as held:
        assert held.is_held


def test_the_lock_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.02)
    with Lock(tmp_path / ".lock", "busy"):
        os.utime(tmp_path / ".lock", (0, 0))
        for _ in range(200):
            if (tmp_path / ".lock").stat().st_mtime:
                break
            threading.Event().wait(0.02)
        assert (tmp_path / ".lock").stat().st_mtime


def test_a_lock_that_was_taken_over_stays_with_its_new_owner(tmp_path: Path) -> None:
    held = Lock(tmp_path / ".lock", "busy")
    held.acquire()
    write_owner(tmp_path / ".lock", pid=1)
    assert not held.is_held
    held.release()
    assert (tmp_path / ".lock").exists()
