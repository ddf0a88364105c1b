"""Several processes share the rows of one cache."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from captioning.features import extraction, workers
from config import UserError
from tests.processes import end, make_photos, start

WRITTEN = (
    *("captions.csv", "vocabulary.json", "skipped.csv", "repaired.csv"),
    *("duplicates.csv", "tiny/features.npy", "tiny/images.csv"),
    *("tiny/finished.bin", "tiny/digests.bin"),
)


def written(folder: Path) -> dict[str, bytes]:
    """The bytes of everything that preprocessing leaves."""
    (cache,) = (folder / "data" / "cache").glob("photos*")
    (tiny,) = (path.parent for path in cache.glob("*/features.npy"))
    found = {
        name: (cache / name.replace("tiny", tiny.name)).read_bytes()
        for name in WRITTEN
    }
    assert not list(tiny.glob("worker-*")), "marks are left"
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    """What a single run writes."""
    folder = tmp_path_factory.mktemp("alone")
    make_photos(folder)
    code, out, _ = end(start(folder))
    assert code == 0 and "1 pairs of images with equal pixels" in out
    return written(folder)


def wait_for(condition, what: str) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, f"no {what}"
        time.sleep(0.01)


def finished_rows(folder: Path) -> np.ndarray:
    paths = list(folder.glob("data/cache/photos*/*/finished.bin"))
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
    processes[2].kill()
    processes[2].communicate()
    done = [end(processes[n]) for n in (0, 1, 3)]
    assert [code for code, _, _ in done] == [0, 0, 0]
    assert all("Next:" not in out for _, out, _ in done)
    assert not list(tmp_path.glob("data/cache/*/captions.csv"))
    before = finished_rows(tmp_path)
    assert len(before) < 119
    code, out, err = end(start(tmp_path, "--worker", "2/4"))
    assert code == 0 and "Next: python train.py" in out, err
    assert written(tmp_path) == alone


def test_exactly_one_of_the_workers_completes_the_cache(alone, tmp_path):
    make_photos(tmp_path)
    processes = [start(tmp_path, "--worker", f"{n}/4") for n in range(4)]
    done = [end(process) for process in processes]
    assert [code for code, _, _ in done] == [0] * 4, done
    assert sum("Next: python train.py" in out for _, out, _ in done) == 1
    assert written(tmp_path) == alone


def test_workers_and_a_run_alone_keep_out_of_each_others_way(tmp_path):
    make_photos(tmp_path)
    worker = start(tmp_path, "--worker", "1/2", pause=1)
    wait_for(lambda: len(finished_rows(tmp_path)), "row of the worker")
    for flags in (["--worker", "1/2"], []):
        code, _, err = end(start(tmp_path, *flags))
        assert code == 1 and len(err.splitlines()) == 1
        assert "another process is at work" in err and "worker-1" in err
    worker.kill()
    worker.communicate()
    single = start(tmp_path, pause=1)
    count = len(finished_rows(tmp_path))
    wait_for(lambda: len(finished_rows(tmp_path)) > count, "further row")
    for flags in (["--worker", "0/2"], []):
        code, _, err = end(start(tmp_path, *flags))
        assert code == 1 and len(err.splitlines()) == 1
        assert "another process is at work" in err
    single.kill()
    single.communicate()
    code, _, err = end(start(tmp_path))
    assert code == 0, err


def refused(held, told: str) -> None:
    with pytest.raises(UserError, match=told), held:
        pass


def test_locks_end_with_their_block(tmp_path):
    with workers.worker(tmp_path, 0), workers.worker(tmp_path, 1):
        refused(workers.alone(tmp_path), "worker-0")
        refused(workers.worker(tmp_path, 1), "worker-1")
    with workers.alone(tmp_path):
        refused(workers.worker(tmp_path, 0), "another process")


def test_the_parts_of_the_workers_are_all_rows_once():
    names = [str(n) for n in range(331)]
    parts = [extraction.share(names, n, 4) for n in range(4)]
    assert sorted(itertools.chain(*parts)) == sorted(names)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= extraction.BATCH


@pytest.mark.parametrize("worker", ["4/4", "-1/4", "1", "a/b", "0/0", ""])
def test_a_worker_that_makes_no_sense_is_wrong_usage(tmp_path, worker):
    code, _, err = end(start(tmp_path, f"--worker={worker}"))
    assert code == 2 and len(err.splitlines()) == 1 and "0/4" in err
