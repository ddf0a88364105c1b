"""A job that loses one of its processes.

In a file of its own: it waits a lot, and other tests run beside it.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from captioning import job
from tests.jobs import end, make_home, on_jax, start_job

pytestmark = pytest.mark.skipif(
    os.name == "nt", reason="needs fork, and signals"
)


@on_jax
def test_a_job_that_loses_a_process_ends_and_goes_on(tmp_path):
    """The others end too; all started again, they end the run."""
    make_home(tmp_path)
    state = tmp_path / "checkpoints" / "lost" / "last" / "state.npz"
    done = 0
    for lost in (0, 1):
        started = start_job(tmp_path, "lost", 2, "--epochs", "900")
        while epochs_of(state) == done:
            assert all(each.poll() is None for each in started)
            time.sleep(0.1)
        started[lost].kill()
        _, told = started[1 - lost].communicate(timeout=120)
        # By an error of its own step, or by JAX, from a thread and at length.
        assert started[1 - lost].returncode not in (0, None)
        if started[1 - lost].returncode == 1:
            assert f"train.py: {job.LOST}\n" in told
        started[lost].communicate()
        done = epochs_of(state)
    flags = ["--epochs", str(done + 1)]
    printed, _ = end(*start_job(tmp_path, "lost", 2, *flags))
    assert f"Resuming in epoch {done + 1}, after" in printed
    history = pd.read_csv(tmp_path / "checkpoints" / "lost" / "history.csv")
    assert len(history) == done + 1
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]


def epochs_of(state: Path) -> int:
    """How many epochs a saved state has."""
    if not state.exists():
        return 0
    return json.loads(str(np.load(state)["progress"]))["epoch"]
