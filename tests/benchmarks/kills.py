"""Whether a run that is killed again and again ends like one that is not.

    python tests/benchmarks/kills.py [--kills 20]

Trains a small run undisturbed. Then gives the same command under another name
and kills it (SIGKILL) at random moments, half of them while it trains with
cross-entropy and half while it trains self-critically, and gives it again until
it ends. Weights, optimizer, random state and history have to be equal bit for
bit. Takes some ten minutes.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from captioning.sample import write_sample  # noqa: E402

FLAGS = [
    *("--dataset", "tiny", "--image-size", "64", "--encoder", "mobilenetv2"),
    *("--encoder-weights", "random", "--batch-images", "4"),
    *("--decoder-units", "64", "--scst-epochs", "4", "--epochs", "8"),
    *("--patience", "100"),
]
TIMINGS = ["seconds"]


def start(folder: Path, script: str, *flags: str) -> subprocess.Popen:
    """Starts a script in a folder of its own."""
    command = [sys.executable, str(ROOT / script), *FLAGS, *flags]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> None:
    """Waits for a script that has to succeed."""
    _, told = process.communicate()
    assert process.returncode == 0, told.decode()


def progress(run: Path) -> dict:
    """How far the saved point of a run is."""
    path = run / "last" / "state.npz"
    if not path.exists():
        return {"epoch": 0, "batch": 0}
    with np.load(path) as state:
        return json.loads(str(state["progress"]))


def kill_at_random(folder: Path, kills: int, seconds: float) -> int:
    """Kills a run so many times; then lets it end.

    Args:
        folder: the data are there, and the runs.
        kills: how many times at most.
        seconds: that a start takes before it trains.

    Returns:
        How many times it was killed before it was done.
    """
    run = folder / "checkpoints" / "killed"
    for number in range(kills):
        process = start(folder, "train.py", "--run-name", run.name)
        time.sleep(random.uniform(0.5, 1.5) * seconds)
        if process.poll() is not None:
            finish(process)
            return number
        process.kill()
        process.communicate()
        there = progress(run)
        print(
            f"kill {number + 1}: saved at epoch {there['epoch']}, batch "
            f"{there['batch']}",
            flush=True,
        )
    finish(start(folder, "train.py", "--run-name", run.name))
    return kills


def compare(folder: Path) -> None:
    """Asserts that both runs are the same bit for bit."""
    places = [folder / "checkpoints" / n for n in ("undisturbed", "killed")]
    one, other = (pd.read_csv(each / "history.csv") for each in places)
    pd.testing.assert_frame_equal(
        one.drop(columns=TIMINGS), other.drop(columns=TIMINGS), check_exact=True
    )
    one, other = (np.load(each / "last" / "state.npz") for each in places)
    for name in set(one.files) - {"progress"}:
        np.testing.assert_array_equal(one[name], other[name])


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_sample(folder / "data" / "tiny", images=60)
        finish(start(folder, "preprocess.py"))
        begun = time.monotonic()
        process = start(folder, "train.py", "--run-name", "undisturbed")
        state = folder / "checkpoints" / "undisturbed" / "last" / "state.npz"
        while process.poll() is None and not state.exists():
            time.sleep(0.1)
        seconds = time.monotonic() - begun
        finish(process)
        total = time.monotonic() - begun
        print(f"undisturbed: {total:.0f} s, first saved after {seconds:.0f} s")
        kills = kill_at_random(folder, arguments.kills, seconds)
        compare(folder)
    print(f"killed {kills} times: equal bit for bit")


if __name__ == "__main__":
    main()
