"""Atomic writes, and the lock that ends with its process."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from captioning import files
from captioning.files import atomic_path, lock, write_csv, write_text
from tests.helpers import refusal

HOLDER = """
import sys, time
from pathlib import Path
from captioning.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
NO_FLOCK = """
import errno, fcntl, os
def flock(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
"""


@contextlib.contextmanager
def held(path: Path, before: str = ""):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", before + HOLDER, str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def refused(path: Path) -> str:
    return refusal(lock(path).__enter__)


# --- atomic writes --------------------------------------------------------


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "metrics.json"
    with atomic_path(path) as part:
        assert part.parent == path.parent and part.suffix == path.suffix
        part.write_text("half", encoding="utf-8")
        assert not path.exists()
        part.write_text("whole", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "whole"
    assert os.listdir(path.parent) == ["metrics.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [["metrics.json"], []])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, error, before):
    path = tmp_path / "metrics.json"
    if before:
        write_text(path, "old")
    with pytest.raises(error), atomic_path(path) as part:
        part.write_text("ne", encoding="utf-8")
        raise error
    assert os.listdir(tmp_path) == before
    assert not before or path.read_text(encoding="utf-8") == "old"


def test_the_bytes_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        files.os, "fsync", lambda *a: (done.append("fsync"), fsync(*a))
    )
    monkeypatch.setattr(
        files.os, "replace", lambda *a: (done.append("replace"), replace(*a))
    )
    write_text(tmp_path / "x.json", "x")
    # And last the name itself, which Windows does not let us wait for.
    assert done == ["fsync", "replace"] + ["fsync"] * (os.name != "nt")


def test_text_and_tables_are_written_as_utf_8(tmp_path):
    write_text(tmp_path / "x.json", "\u72ac")
    assert (tmp_path / "x.json").read_bytes() == b"\xe7\x8a\xac"
    write_csv(tmp_path / "x.csv", [("a,b", 'c"d'), ("", "null")], ["x", "y"])
    text = (tmp_path / "x.csv").read_bytes()
    assert text == b'x,y\n"a,b","c""d"\n,null\n'
    write_csv(tmp_path / "x.csv", [], ["image", "reason"])
    assert list(pd.read_csv(tmp_path / "x.csv")) == ["image", "reason"]


# --- lock -----------------------------------------------------------------


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "run"
    with held(path) as process:
        told = refused(path)
        assert told.startswith(f"another process is using {path}: ")
        process.kill()
        process.wait()
        with lock(path), lock(tmp_path / "other"):
            pass


def test_who_waits_gets_the_lock_when_the_other_process_ends(tmp_path):
    with held(tmp_path / "run") as process:
        timer = threading.Timer(0.2, process.kill)
        timer.start()
        with lock(tmp_path / "run", wait=True):
            assert process.wait(timeout=10)
        timer.join()


def test_an_error_under_a_lock_passes_and_frees_it(tmp_path):
    path = tmp_path / "new" / "run"
    for _ in range(2):
        with pytest.raises(OSError, match="odd"), lock(path):
            raise OSError("odd")


def test_a_locked_folder_can_be_moved_and_stays_locked(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    with lock(path):
        path.rename(tmp_path / "old run")
        refused(path)
    assert os.listdir(tmp_path / "old run") == []


def test_a_folder_that_cannot_be_written_is_not_taken_for_a_lock(tmp_path):
    (tmp_path / ".run.lock").mkdir()  # root may write anywhere else
    with pytest.raises(OSError) as error, lock(tmp_path / "run"):
        pass
    assert error.value.filename
    assert os.listdir(tmp_path) == [".run.lock"]


# --- disks without locks --------------------------------------------------


@pytest.fixture
def no_flock(monkeypatch):
    """A disk that refuses locks, with one error or another."""
    fcntl = pytest.importorskip("fcntl")
    files._note_soft_lock.cache_clear()

    def refuse_with(number: int) -> None:
        def flock(*_) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse_with(errno.ENOSYS)
    return refuse_with


@pytest.mark.parametrize(
    "number",
    [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM, errno.EINVAL],
)
def test_a_disk_without_locks_is_noted_once_and_used(
    tmp_path, no_flock, capsys, number
):
    no_flock(number)
    for _ in range(2):
        with lock(tmp_path / "run"), lock(tmp_path / "other"):
            assert "another process" in refused(tmp_path / "run")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and os.strerror(number) in told


def test_a_killed_process_leaves_no_lock_there_either(tmp_path, no_flock):
    with held(tmp_path / "run", NO_FLOCK) as process:
        refused(tmp_path / "run")
        process.kill()
        process.wait()
        with lock(tmp_path / "run"):
            refused(tmp_path / "run")
        with lock(tmp_path / "run", wait=True):
            pass


def test_a_marker_of_another_machine_is_named(tmp_path, no_flock):
    marker = tmp_path / ".run.softlock"
    with lock(tmp_path / "run"):
        pid, host, *rest = marker.read_text().split("\n")
    marker.write_text("\n".join([pid, host + "-2", *rest]))
    assert f"delete {marker}" in refused(tmp_path / "run")


def test_too_little_memory_is_no_fault_of_a_file(tmp_path):
    with pytest.raises(MemoryError), files.reading(tmp_path, "get another"):
        raise MemoryError
