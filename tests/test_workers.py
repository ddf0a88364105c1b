"""Several processes share the rows of one cache."""

import itertools
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from captioning.features import extraction, workers
from captioning.files import lock
from tests.helpers import files_in
from tests.processes import bad, end, good, make_photos, run, start


def written(folder: Path) -> dict[str, bytes]:
    """The bytes of everything that preprocessing leaves."""
    cache = folder / "data" / "cache" / "photos"
    found = {
        name: data
        for name, data in files_in(cache).items()
        # These know the folder, or when the photographs were written.
        if not name.endswith(("dataset.json", "meta.json", "images.csv"))
    }
    assert not any("worker-" in name for name in found), "marks are left"
    (path,) = cache.glob("features/*/images.csv")
    found["images"] = pd.read_csv(path)["image"].to_json().encode()
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    """What a single run writes."""
    folder = tmp_path_factory.mktemp("alone")
    make_photos(folder)
    assert "1 pairs of identical images" in good(folder)
    return written(folder)


def wait_for(condition, what: str) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, f"no {what}"
        time.sleep(0.01)


def finished_rows(folder: Path) -> np.ndarray:
    paths = list(folder.glob("data/cache/photos/features/*/finished.bin"))
    data = paths[0].read_bytes() if paths else b""
    return np.flatnonzero(np.frombuffer(data, np.uint8))


def test_four_workers_one_of_them_killed_write_what_a_single_run_writes(
    alone, tmp_path
):
    make_photos(tmp_path)
    processes = [
        start(tmp_path, "--worker", f"{n}/4", pause=0.4) for n in range(4)
    ]

    def third_has_begun() -> bool:
        rows = finished_rows(tmp_path)
        return bool((rows // 4 % 4 == 2).any())

    wait_for(third_has_begun, "row of the third worker")
    kill(processes[2])
    done = [end(processes[n]) for n in (0, 1, 3)]
    assert [code for code, _, _ in done] == [0, 0, 0]
    assert all("Next:" not in out for _, out, _ in done)
    assert not list(tmp_path.glob("data/cache/*/*/captions.csv"))
    before = finished_rows(tmp_path)
    assert len(before) < 119
    assert "Next: python train.py" in good(tmp_path, "--worker", "2/4")
    assert written(tmp_path) == alone


def test_exactly_one_of_the_workers_completes_the_cache(alone, tmp_path):
    make_photos(tmp_path)
    processes = [start(tmp_path, "--worker", f"{n}/4") for n in range(4)]
    done = [end(process) for process in processes]
    assert [code for code, _, _ in done] == [0] * 4, done
    assert sum("Next: python train.py" in out for _, out, _ in done) == 1
    assert written(tmp_path) == alone


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def keep_out(folder: Path, *flags: str) -> None:
    """Runs preprocess.py, which another process at work has to keep out."""
    assert "another process is using" in bad(folder, *flags)


def start_encoding(folder: Path, *flags: str) -> subprocess.Popen:
    """Starts a process, and waits until it has begun to encode."""
    before = len(finished_rows(folder))
    process = start(folder, *flags, pause=60)
    wait_for(lambda: len(finished_rows(folder)) > before, "further row")
    return process


def test_workers_and_a_run_alone_keep_out_of_each_others_way(tmp_path):
    make_photos(tmp_path)
    worker = start_encoding(tmp_path, "--worker", "1/2")
    keep_out(tmp_path, "--worker", "1/2")
    keep_out(tmp_path)
    # In other parts, or on other captions of the same images.
    keep_out(tmp_path, "--worker", "0/3")
    keep_out(tmp_path, "--worker", "0/2", "--limit-images", "9")
    keep_out(tmp_path, "--limit-images", "9")
    kill(worker)
    single = start_encoding(tmp_path, "--limit-images", "15")
    keep_out(tmp_path, "--worker", "0/2")
    keep_out(tmp_path)
    kill(single)
    good(tmp_path)


def nothing() -> None:
    pass


def test_marks_are_of_the_work_on_some_images(tmp_path):
    place = tmp_path / "key"
    for text in ("a", "b"):
        assert workers.do_part(place, text, 0, 2, nothing) == [1]
    workers.clear(place, "b")
    assert workers.do_part(place, "b", 1, 2, nothing) == [0]
    assert workers.do_part(place, "a", 1, 2, nothing) == []


def test_whoever_sees_the_mark_of_a_worker_finds_its_lock_free(
    tmp_path, monkeypatch
):
    place = tmp_path / "key"
    write, seen = workers.write_text, []

    def write_and_look(path: Path, text: str) -> None:
        write(path, text)
        seen.append(path.name)
        with lock(place.with_name(f"{place.name}.{path.stem}")):
            pass

    monkeypatch.setattr(workers, "write_text", write_and_look)
    workers.do_part(place, "a", 0, 2, nothing)
    assert seen == ["worker-0-of-2-a.txt"]


def test_a_worker_that_fails_leaves_no_mark(tmp_path):
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.do_part(tmp_path / "key", "a", 0, 2, fail)
    assert workers.do_part(tmp_path / "key", "a", 1, 2, nothing) == [0]


def test_the_parts_of_the_workers_are_all_rows_once():
    names = [str(n) for n in range(331)]
    parts = [extraction.share(names, n, 4) for n in range(4)]
    assert sorted(itertools.chain(*parts)) == sorted(names)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= extraction.BATCH


@pytest.mark.parametrize("worker", ["4/4", "-1/4", "1", "a/b", "0/0", ""])
def test_a_worker_that_makes_no_sense_is_wrong_usage(tmp_path, worker):
    code, _, err = run(tmp_path, f"--worker={worker}")
    assert code == 2 and len(err.splitlines()) == 1 and "0/4" in err
