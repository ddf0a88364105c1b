"""One run on several devices, and in several processes: the same run."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from captioning import job
from config import UserError
from tests.jobs import (
    DATA,
    TRAINING,
    end,
    make_home,
    on_jax,
    start,
    start_job,
)
from tests.scripts import good

pytestmark = pytest.mark.skipif(
    os.name == "nt", reason="needs fork, and signals"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a run on one device, by the name of `one`."""
    folder = tmp_path_factory.mktemp("home")
    make_home(folder)
    good("train.py", *DATA, *TRAINING, "--run-name", "one", folder=folder)
    return folder


def assert_same(home: Path, run: str) -> None:
    """The same history and weights as on one device, to rounding."""
    places = [home / "checkpoints" / name for name in ("one", run)]
    columns = ["loss", "token_accuracy", "val_loss", "val_cider"]
    one, other = (pd.read_csv(f / "history.csv")[columns] for f in places)
    assert len(one) == 2
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    one, other = (np.load(f / "last" / "state.npz") for f in places)
    for name in set(one.files) - {"progress"}:
        np.testing.assert_allclose(one[name], other[name], atol=1e-3)


@on_jax
def test_a_run_on_three_devices_is_the_run_on_one(home):
    flags = os.environ["XLA_FLAGS"]
    flags += " --xla_force_host_platform_device_count=3"
    (printed,) = end(start(home, "three", XLA_FLAGS=flags))
    assert "3 devices" in printed
    assert_same(home, "three")


@on_jax
def test_a_run_of_two_processes_is_the_run_of_one(home):
    printed, other = end(*start_job(home, "two", 2))
    assert "2 devices" in printed
    assert not re.sub(r"\[Gloo\].*", "", other).strip()
    assert_same(home, "two")


@on_jax
def test_self_critical_training_of_two_processes_is_that_of_one(home):
    runs = ["sampled-by-one", "sampled-by-two"]
    for run in runs:
        place = home / "checkpoints" / run
        shutil.copytree(home / "checkpoints" / "one", place)
    flags = ("--scst-epochs", "1")
    words = [*DATA, *TRAINING, "--run-name", runs[0], *flags]
    good("train.py", *words, folder=home)
    printed, _ = end(*start_job(home, runs[1], 2, *flags))
    assert "2 devices" in printed and "reward" in printed
    histories, states = [], []
    for run in runs:
        place = home / "checkpoints" / run
        histories.append(pd.read_csv(place / "history.csv"))
        states.append(np.load(place / "last" / "state.npz"))
    columns = ["val_cider", "reward"]
    one, other = (each[columns].iloc[-1] for each in histories)
    assert len(histories[1]) == 3
    np.testing.assert_allclose(one, other, rtol=1e-4)
    for name in set(states[0].files) - {"progress"}:
        if states[0][name].dtype.kind == "f":  # dropout, off, has its seeds
            one, other = (each[name] for each in states)
            np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(
    ("processes", "process", "told"),
    [
        ("", "0", job.PROCESSES),
        ("two", "0", job.PROCESSES),
        ("2", "-1", job.PROCESS),
        ("2", "2", "the last is number 1"),
        ("2", "0", "set KERAS_BACKEND=jax"),
    ],
)
def test_a_job_that_is_described_wrongly_is_refused(
    monkeypatch, processes, process, told
):
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    monkeypatch.setenv(job.ADDRESSES, "127.0.0.1:1")
    monkeypatch.setenv(job.PROCESSES, processes)
    monkeypatch.setenv(job.PROCESS, process)
    with pytest.raises(UserError, match=told), job.joined():
        pass
