"""Whether a run that is killed again and again ends like one that is not.

    python tests/benchmarks/kills.py [--kills 20]

Trains a small run undisturbed. Then gives the same command under another name
and kills it (SIGKILL) at random moments, first while it trains with
cross-entropy and then while it trains self-critically, and gives it again until
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

from captioning.data.sample import write_sample  # noqa: E402

EPOCHS, SCST_EPOCHS = 24, 12
FLAGS = (
    "--dataset tiny --image-size 64 --encoder scenes --encoder-weights random "
    "--batch-images 4 --decoder-units 64 --patience 100 "
    f"--epochs {EPOCHS} --scst-epochs {SCST_EPOCHS}"
).split()
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


def progress(run: Path) -> tuple[int, int]:
    """How far the saved state of a run is, as epoch and batch."""
    path = run / "last" / "state.npz"
    if not path.exists():
        return 0, 0
    with np.load(path) as state:
        found = json.loads(str(state["progress"]))
    return found["epoch"], found["batch"]


def kill_at_random(
    folder: Path, kills: int, starting: float, pace: float
) -> int:
    """Kills a run so many times; then lets it end.

    One kill in four comes before the run has done anything, the others at
    random moments of the epochs that follow the first state it saves.

    Args:
        folder: the data are there, and the runs.
        kills: how many times.
        starting: seconds until the first state is saved.
        pace: seconds between one saved state and the next.

    Returns:
        How many times it was killed before it was done.
    """
    run = folder / "checkpoints" / "killed"
    for number in range(kills):
        before = progress(run)
        process = start(folder, "train.py", "--run-name", run.name)
        if random.random() < 0.25:
            time.sleep(random.uniform(0, starting))
        else:
            while progress(run) == before and process.poll() is None:
                time.sleep(0.05)
            time.sleep(random.uniform(0, 1.5 * pace))
        if process.poll() is not None:
            finish(process)
            return number
        process.kill()
        process.communicate()
        epoch, batch = progress(run)
        print(
            f"kill {number + 1}: saved at epoch {epoch}, batch {batch}",
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
        starting = time.monotonic() - begun
        finish(process)
        total = time.monotonic() - begun
        pace = (total - starting) / (EPOCHS + SCST_EPOCHS)
        print(
            f"undisturbed: {total:.0f} s, first saved after {starting:.0f} s",
            flush=True,
        )
        kills = kill_at_random(folder, arguments.kills, starting, pace)
        compare(folder)
    print(f"killed {kills} times: equal bit for bit")


if __name__ == "__main__":
    main()
