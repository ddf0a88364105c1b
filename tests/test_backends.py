"""The same runs on TensorFlow and on JAX."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from captioning.data.sample import write_sample
from captioning.training import callbacks
from config import UserError
from tests.probe import probe
from tests.scripts import ROOT, good

HERE = keras.backend.backend()
OTHER = "jax" if HERE == "tensorflow" else "tensorflow"
FLAGS = (
    "--dataset tiny --image-size 64 --encoder scenes "
    "--encoder-weights random --max-caption-length 6 "
    "--precision float32"
).split()
TRAINING = (
    "--epochs 1 --batch-images 4 --captions-per-image 3 "
    "--decoder-units 16 --attention-units 16 "
    "--embedding-units 16 --learning-rate 0.01"
).split()
RUN = "tiny-scenes"
# Runs scripts one after the other; none of them may import TensorFlow.
MANY = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.scripts import good
for line in sys.argv[2:]:
    good(*line.split("|"), folder=".")
    assert "tensorflow" not in sys.modules, line
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a run on a tiny sample."""
    folder = tmp_path_factory.mktemp("home")
    write_sample(folder / "data" / "tiny", images=24)
    good("preprocess.py", *FLAGS, folder=folder)
    good("train.py", *FLAGS, *TRAINING, folder=folder)
    return folder


def python(backend: str, *arguments, folder: Path) -> None:
    """Runs Python on a backend; it has to succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_says_the_same_on_the_other_backend(home, tmp_path):
    """The other way round it is tested where the suite runs on the other."""
    file = tmp_path / "other.npz"
    python(OTHER, "-m", "tests.probe", home, RUN, file, folder=home)
    with contextlib.chdir(home):
        here = probe(home, RUN)
    with np.load(file) as there:
        assert str(there["backend"]) == OTHER != str(here["backend"])
        np.testing.assert_array_equal(there["words"], here["words"])
        # There is something to differ in.
        assert (here["log_probabilities"] < -0.5).any()
        assert len(set(here["captions"])) > 1
        for name in ("log_probabilities", "scores"):
            np.testing.assert_allclose(there[name], here[name], atol=1e-4)


def test_a_run_goes_on_on_the_other_backend(home):
    """And is logged for TensorBoard, which JAX does where it is asked to."""
    place = home / "checkpoints" / RUN
    before = pd.read_csv(place / "history.csv")
    logs = set(place.rglob("events*"))
    flags = [*FLAGS, *TRAINING, "--epochs", "8", "--tensorboard"]
    python(OTHER, ROOT / "train.py", *flags, folder=home)
    assert set(place.rglob("events*")) > logs
    table = pd.read_csv(place / "history.csv")
    pd.testing.assert_frame_equal(table[:1], before)
    # Dropout draws something else there; after some epochs that is no matter.
    assert table["val_loss"].iloc[-1] < table["val_loss"][0] - 0.1


@pytest.mark.skipif(HERE == "jax", reason="starts JAX from either backend")
def test_on_jax_nothing_imports_tensorflow(home):
    flags = [*FLAGS, "--run-name", "alone"]
    data = ["--min-word-count", "2"]
    photo = "data/tiny/images/scene_00000.jpg"
    lines = [
        ["preprocess.py", *FLAGS, *data],
        ["train.py", *flags, *data, *TRAINING, "--scst-epochs", "1"],
        ["evaluate.py", *flags, *data, "--split", "val"],
        ["caption.py", *flags, "--json", "--attention", "maps", photo],
    ]
    lines = ["|".join(each) for each in lines]
    python("jax", "-c", MANY, ROOT, *lines, folder=home)
    place = home / "checkpoints" / "alone"
    assert pd.read_csv(place / "history.csv")["reward"].notna().any()
    assert (place / "evaluation" / "val" / "report.html").exists()
    assert len(list((home / "maps").glob("*.png"))) == 1
    assert not (place / "tensorboard").exists()


def test_tensorboard_without_tensorflow_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorflow"):
        callbacks.check_boards(True)
