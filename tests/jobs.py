"""Helpers for tests that start train.py several times as one job."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from captioning import job
from captioning.backend import TENSORFLOW
from captioning.data.sample import write_sample
from tests.scripts import ROOT, good

on_jax = pytest.mark.skipif(TENSORFLOW, reason="processes join on JAX alone")
DATA = (
    "--dataset tiny --image-size 64 --encoder scenes "
    "--encoder-weights random --max-caption-length 4 "
    "--precision float32"
).split()
# Five images a batch, of 37: three devices get two, two and one of them, and of
# the two of the last batch two and none. Every gradient is clipped.
TRAINING = (
    "--epochs 2 --cider-every 1 --batch-images 5 "
    "--decoder-units 16 --attention-units 16 "
    "--embedding-units 16 --learning-rate 0.01 "
    "--clip-norm 0.1 --scst-learning-rate 0.01 "
    # Several devices have captions in another order: others would drop out.
    "--word-dropout 0 --output-dropout 0"
).split()


def make_home(folder: Path) -> None:
    """A preprocessed dataset."""
    data = folder / "data" / "tiny"
    write_sample(data, images=45)
    table = pd.read_csv(data / "captions.csv")
    # Devices with equally many images get different numbers of words.
    short = table.groupby("image").ngroup() % 3 == 0
    table.loc[short, "caption"] = "a scene"
    table.to_csv(data / "captions.csv", index=False)
    good("preprocess.py", *DATA, folder=folder)


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
    """Starts several processes that train one run together."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            folder,
            run,
            *flags,
            **{job.ADDRESSES: f"127.0.0.1:{port}"},
            **{job.PROCESSES: processes, job.PROCESS: process},
        )
        for process in range(processes)
    ]
