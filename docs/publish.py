"""A trained run -> a folder small enough to give away.

    python docs/publish.py checkpoints/flickr8k-xception checkpoints/pretrained

Keeps what captioning needs, with the weights in half precision: half the
bytes. The encoder's weights have to be the ImageNet weights that Keras
downloads, so that nobody needs a file of them.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from captioning import command, runs  # noqa: E402
from captioning.files import atomic_path  # noqa: E402
from config import ENCODERS, Config, UserError, group  # noqa: E402

ACTIONS: command.Actions = {
    "run": {"metavar": "RUN", "help": "the run folder"},
    "folder": {"metavar": "FOLDER", "help": "where to"},
}


def main(arguments: command.Arguments) -> None:
    """Publishes a run."""
    run = Path(arguments.actions.run)
    place = Path(arguments.actions.folder)
    config = runs.load_config(run)
    descriptions = runs.load_description(run).encoders
    for each in descriptions:
        if each["weights"] != ENCODERS[each["encoder"]].imagenet:
            raise UserError(
                f"{run} was trained with the {each['encoder']} weights "
                f"{each['weights']}, which Keras does not download"
            )
    # Places are those of whoever has the folder.
    places = {name: getattr(Config(), name) for name in group("place")}
    places |= {"run_name": place.name, "encoder_weights": "imagenet"}
    runs.save_config(dataclasses.replace(config, **places), place)
    for name in (runs.VOCABULARY, runs.FEATURES, runs.IMAGES):
        shutil.copy(run / name, place / name)
    with atomic_path(place / runs.WEIGHTS) as part:
        halve(run / runs.WEIGHTS, part)
    size = sum(each.stat().st_size for each in place.iterdir())
    print(
        f"Wrote {place}, {size / 1e6:.1f} MB. Next: python caption.py "
        f"--run-name {place.name} PHOTO"
    )


def halve(source: Path, target: Path) -> None:
    """Copies a weights file with its matrices in half precision.

    Vectors stay as they are: they are small, and the deviations of the
    features among them are close to zero.
    """
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        new.attrs.update(old.attrs)

        def copy(name: str, entry: h5py.Group | h5py.Dataset) -> None:
            if isinstance(entry, h5py.Group):
                new.require_group(name).attrs.update(entry.attrs)
                return
            values = entry[()]
            if values.ndim > 1:
                values = values.astype(np.float16)
            new.create_dataset(name, data=values).attrs.update(entry.attrs)

        old.visititems(copy)


if __name__ == "__main__":
    command.run(main, __doc__, ACTIONS)
