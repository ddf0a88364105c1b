"""What a model scores that never sees the image.

    python tests/benchmarks/blind.py [flags of preprocess.py and train.py]

Copies the feature cache with its images exchanged at random, so that every
image has the features of another one, trains a run on that and evaluates it.
What the run reaches is what the captions alone give away; a model that looks
has to be far above it. Run preprocess.py with the same flags first. The run
is named `blind`, below the folders `data/blind` and `checkpoints`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from captioning import command  # noqa: E402
from captioning.data import prepared  # noqa: E402
from captioning.files import write_csv  # noqa: E402
from config import Config  # noqa: E402


def exchange_images(cache: Path, blind: Path) -> None:
    """Copies a cache folder and gives every image another one's features.

    Args:
        cache: data/cache/<dataset>.
        blind: where the copy goes; features are linked, not copied.
    """
    shutil.rmtree(blind, ignore_errors=True)
    shutil.copytree(cache, blind, copy_function=_link)
    for path in blind.glob("features/*/images.csv"):
        names = pd.read_csv(path, dtype=str, keep_default_na=False)
        exchanged = names.sample(frac=1, random_state=0)
        path.unlink()  # a link: the original must stay as it is
        write_csv(path, exchanged)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def main(arguments: command.Arguments) -> None:
    """Trains and evaluates the blind model."""
    config: Config = arguments.config
    cache = prepared.root(config)
    data_dir = Path(config.data_dir) / "blind"
    exchange_images(cache, data_dir / "cache" / cache.name)
    flags = [*sys.argv[1:], "--data-dir", str(data_dir), "--run-name", "blind"]
    for script in (["train.py", "--fresh"], ["evaluate.py"]):
        subprocess.run([sys.executable, *script, *flags], cwd=ROOT, check=True)


if __name__ == "__main__":
    command.run(main, __doc__, {})
