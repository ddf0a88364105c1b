"""One run on several devices, and in several processes: the same run."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from captioning import job
from captioning.backend import TENSORFLOW
from captioning.data.sample import write_sample
from config import UserError
from tests.scripts import ROOT, good

pytestmark = pytest.mark.skipif(
    os.name == "nt", reason="needs fork, and signals"
)
on_jax = pytest.mark.skipif(TENSORFLOW, reason="processes join on JAX alone")
DATA = [
    *("--dataset", "tiny", "--image-size", "64", "--encoder", "mobilenetv2"),
    *("--encoder-weights", "random", "--max-caption-length", "4"),
    *("--precision", "float32"),
]
# Five images a batch, of 37: three devices get two, two and one of them, and of
# the two of the last batch two and none. Every gradient is clipped.
TRAINING = [
    *("--epochs", "2", "--cider-every", "1", "--batch-images", "5"),
    *("--decoder-units", "16", "--attention-units", "16"),
    *("--embedding-units", "16", "--learning-rate", "0.01"),
    *("--clip-norm", "0.1", "--scst-learning-rate", "0.01"),
    # Several devices have captions in another order: others would drop out.
    *("--word-dropout", "0", "--output-dropout", "0"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a run on one device, by the name of `one`."""
    folder = tmp_path_factory.mktemp("home")
    data = folder / "data" / "tiny"
    write_sample(data, images=45)
    table = pd.read_csv(data / "captions.csv")
    # Devices with as many images shall differ in how many words they have.
    short = table.groupby("image").ngroup() % 3 == 0
    table.loc[short, "caption"] = "a scene"
    table.to_csv(data / "captions.csv", index=False)
    good("preprocess.py", *DATA, folder=folder)
    end(start(folder, "one"))
    return folder


def start(folder: Path, run: str, *flags: str, **environment) -> subprocess:
    """Starts train.py, with variables in its environment."""
    words = [*DATA, *TRAINING, "--run-name", run, *flags]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=folder,
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(*processes: subprocess.Popen) -> list[str]:
    """Waits for processes that have to succeed; gives what they printed."""
    printed = []
    for each in processes:
        out, err = each.communicate(timeout=600)
        assert each.returncode == 0, err[-3000:]
        printed.append(out)
    return printed


def start_job(folder: Path, run: str, processes: int, *flags: str) -> list:
    """Starts so many processes that train one run."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            *(folder, run, *flags),
            **{job.ADDRESSES: f"127.0.0.1:{port}"},
            **{job.PROCESSES: processes, job.PROCESS: process},
        )
        for process in range(processes)
    ]


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
    end(start(home, runs[0], *flags))
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


@on_jax
def test_a_job_that_loses_a_process_ends_and_goes_on(home):
    """The others end too; all started again, they end the run."""
    state = home / "checkpoints" / "lost" / "last" / "state.npz"
    done = 0
    for lost in (0, 1):
        started = start_job(home, "lost", 2, "--epochs", "900")
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
    printed, _ = end(*start_job(home, "lost", 2, *flags))
    assert f"Resuming after {done} epochs" in printed
    history = pd.read_csv(home / "checkpoints" / "lost" / "history.csv")
    assert len(history) == done + 1
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]


def epochs_of(state: Path) -> int:
    """How many epochs a saved state has."""
    if not state.exists():
        return 0
    return json.loads(str(np.load(state)["progress"]))["epoch"]


@pytest.mark.parametrize(
    ("processes", "process", "told"),
    [
        ("", "0", job.PROCESSES),
        ("two", "0", job.PROCESSES),
        ("2", "-1", job.PROCESS),
        ("2", "2", "the last one is 1"),
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
