"""The run folder: config, vocabulary, weights, and what resuming needs."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd

from captioning.data import vocabulary
from captioning.files import (
    atomic_path,
    read_json,
    reading,
    reason,
    write_csv,
    write_json,
)
from config import FIELDS, OPEN, SAMPLE, Config, UserError, group

UNKNOWN_PIXELS = "0" * 16
# The files of a run folder; each is read in one function and written in one.
CONFIG, VOCABULARY = "config.json", "vocabulary.json"
FEATURES, IMAGES = "features.json", "training_images.csv"
WEIGHTS, STATE = "model.weights.h5", "last/state.npz"
AGAIN = "start over with train.py --fresh"
PRETRAINED = "pretrained"  # the run that comes with the project


class Description(NamedTuple):
    """The features that a run was trained on, and the run it started from."""

    encoders: list[dict[str, Any]]  # of the features of each
    shape: tuple[int, int]  # of all joined, (regions, channels)
    started_from: str  # its name; empty if from scratch


def folder(config: Config) -> Path:
    """The folder of the run that a resolved config names."""
    return Path(config.checkpoints_dir) / config.run_name


def newest_of_photographs(checkpoints_dir: str) -> str:
    """The run that captions photographs where none is named.

    Returns:
        The name of the newest run that was trained on photographs, or of the
        pretrained one if there is no other.

    Raises:
        UserError: if there is none.
    """
    found = []
    for path in Path(checkpoints_dir).glob(f"*/{WEIGHTS}"):
        dataset = read_json(path.with_name(CONFIG)).get("dataset", SAMPLE)
        if dataset != SAMPLE:
            own = path.parent.name != PRETRAINED
            found.append((own, path.stat().st_mtime, path.parent.name))
    if not found:
        raise UserError(
            f"there is no run in {checkpoints_dir} that was trained on "
            f"photographs: train one, or restore {checkpoints_dir}/"
            f"{PRETRAINED} with git checkout"
        )
    return max(found)[-1]


def set_aside(place: Path) -> Path:
    """Renames a run folder out of the way; returns its new path.

    Raises:
        UserError: if it is not a run.
    """
    refuse_other_folder(place)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return place.rename(place.with_name(f"{place.name}-before-{stamp}"))


def refuse_other_folder(place: Path) -> None:
    """Refuses to turn a folder that holds other files into a run.

    A run that was killed while it began has only files that `begin` writes.
    """
    if (place / CONFIG).exists() or not place.exists():
        return
    paths = [*place.iterdir()] if place.is_dir() else [place]
    own = (FEATURES, VOCABULARY, IMAGES)
    others = [p.name for p in paths if p.name not in own and p.name[0] != "."]
    if others:
        raise UserError(
            f"{place} already exists and is not a run (it contains "
            f"{min(others)}): give another --run-name or --checkpoints-dir"
        )


# --- the config --------------------------------------------------------------


def save_config(config: Config, place: Path) -> None:
    """Writes the config that trains a run."""
    write_json(place / CONFIG, dataclasses.asdict(config))


def load_config(place: Path, training: bool = False) -> Config:
    """Reads the config that trained a run.

    Args:
        place: the run folder.
        training: whether the run is to be resumed, so that nothing may be
            filled in by today's defaults.

    Raises:
        UserError: if there is none, it is damaged, or it is from a version
            with other fields.
    """
    path = place / CONFIG
    if not path.exists():
        raise UserError(_no_run(place))
    with reading(path, AGAIN):
        fields = json.loads(path.read_text(encoding="utf-8"))
        config = Config(**{k: v for k, v in fields.items() if k in FIELDS})
    needed = [*group("model"), *group("data"), *group("encoder")]
    needed += group("training") if training else []
    wrong = [name for name in needed if name not in fields]
    if training:
        wrong += [name for name in OPEN if fields.get(name) == OPEN[name]]
        wrong += sorted(fields.keys() - FIELDS.keys())
    if wrong:
        raise UserError(
            f"{path} is from another version, which differs in "
            f"{' and '.join(wrong)}: train the run again with train.py "
            "--fresh, or under another --run-name"
        )
    return config


def _no_run(place: Path) -> str:
    text = f"there is no trained run in {place}: run train.py first"
    runs = [path.parent.name for path in place.parent.glob(f"*/{CONFIG}")]
    if runs:
        text += f", or choose one with --run-name ({', '.join(sorted(runs))})"
    return text


# --- what a run was trained on -----------------------------------------------


def begin(
    config: Config,
    place: Path,
    words: vocabulary.Vocabulary,
    descriptions: list[dict[str, Any]],
    shape: tuple[int, ...],
    images: pd.DataFrame,
    start: Path | None = None,
) -> None:
    """Writes what a run depends on, or compares it with what it was.

    Args:
        config: what trains it.
        place: the run folder.
        words: of the training split.
        descriptions: of the features of each encoder, from `encoder_weights`.
        shape: of an image's features, (regions, channels).
        images: of the training split, from `digest_images`.
        start: the folder of the run whose weights it starts from.

    Raises:
        UserError: if the run began with other words, features, images or
            weights.
    """
    images = images.sort_values(["name", "pixels"], ignore_index=True)
    if (place / STATE).exists():
        began = load_description(place)
        known = _load_images(place)
        own = images if known is None else known[known["name"] != ""]
        for what, same in {
            "vocabulary has": load_vocabulary(place) == words,
            "encoder has": began[:2] == (descriptions, tuple(shape)),
            "training images have": images.equals(own),
            "starting run has": not start or start.name == began.started_from,
        }.items():
            if not same:
                raise UserError(
                    f"the {what} changed since {place} was begun: give "
                    "--fresh to start over, or another --run-name"
                )
    else:
        before = _load_images(start) if start else None
        if before is not None:
            # The names of another dataset's images mean nothing in this one.
            images = pd.concat([images, before.assign(name="")])
        fields = {"encoders": descriptions, "shape": shape}
        fields["started_from"] = start.name if start else ""
        write_json(place / FEATURES, fields)
        vocabulary.save(words, place / VOCABULARY)
        write_csv(place / IMAGES, images)
    save_config(config, place)


def load_description(place: Path) -> Description:
    """Reads what a run was trained on.

    Raises:
        UserError: if it is not there, or damaged.
    """
    path = place / FEATURES
    with reading(path, AGAIN):
        fields = json.loads(path.read_text(encoding="utf-8"))
        regions, channels = fields["shape"]
        return Description(
            fields["encoders"], (regions, channels), fields["started_from"]
        )


def load_vocabulary(place: Path) -> vocabulary.Vocabulary:
    """Reads the vocabulary of a run.

    Raises:
        UserError: if it is not there, or damaged.
    """
    return vocabulary.load(place / VOCABULARY, AGAIN)


def digest_images(names: Sequence[str], pixels: np.ndarray) -> pd.DataFrame:
    """Digests that tell later whether a run was trained on an image.

    Args:
        names: of the images.
        pixels: digests of their pixels, uint8 (images, bytes), from
            `features.load_digests`.

    Returns:
        Columns `name` and `pixels`, 16 hex digits each.
    """
    names = [hashlib.sha256(name.encode()).hexdigest()[:16] for name in names]
    shortened = [each[:8].tobytes().hex() for each in pixels]
    return pd.DataFrame({"name": names, "pixels": shortened}, dtype=str)


def _load_images(place: Path) -> pd.DataFrame | None:
    """Which images a run was trained on; None where it is not known."""
    path = place / IMAGES
    if not path.exists():
        return None
    with reading(path, AGAIN):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return table[["name", "pixels"]]


def trained_on(
    place: Path, names: Sequence[str], pixels: np.ndarray, same_dataset: bool
) -> np.ndarray | None:
    """Which images a run has seen in training.

    Equal pixels are found under any name. Within a dataset equal names count
    too, whatever happened to the pixels; elsewhere they do not, because many
    datasets have a 1.jpg.

    Args:
        place: the run folder.
        names: of the images.
        pixels: digests of their pixels, uint8 (images, bytes); only zeros
            where they are not known.
        same_dataset: whether the run was trained on the same dataset.

    Returns:
        bool (images,); None if the run does not say what it was trained on.
    """
    known = _load_images(place)
    if known is None:
        return None
    found = digest_images(names, pixels)
    seen = found["pixels"].isin({*known["pixels"]} - {UNKNOWN_PIXELS})
    if same_dataset:
        seen |= found["name"].isin(known["name"])
    return seen.to_numpy()


# --- weights, and the state that resuming needs ------------------------------


@contextlib.contextmanager
def _without_optimizer(model: Any) -> Iterator[None]:
    """Hides the optimizer, whose state is three times as large, from Keras."""
    optimizer, model.optimizer = getattr(model, "optimizer", None), None
    try:
        yield
    finally:
        model.optimizer = optimizer


def save_weights(model: Any, place: Path, epoch: int) -> None:
    """Writes the best weights, with their epoch in the same file."""
    with atomic_path(place / WEIGHTS) as part, _without_optimizer(model):
        model.save_weights(part)
        with h5py.File(part, "a") as file:
            file.attrs["epoch"] = epoch


def best_epoch(place: Path) -> int | None:
    """The epoch that a run's weights come from, counted from 1."""
    try:
        with h5py.File(place / WEIGHTS) as file:
            return int(file.attrs["epoch"])
    except (OSError, KeyError):
        return None


def weights(place: Path) -> Path:
    """The file of the best weights.

    Raises:
        UserError: if there is none yet.
    """
    path = place / WEIGHTS
    if not path.exists():
        raise UserError(
            f"{path} does not exist yet: train.py writes it when it first "
            "measures CIDEr; run train.py to the end"
        )
    return path


def load_weights(model: Any, place: Path) -> None:
    """Reads the best weights.

    Raises:
        UserError: if there are none, or they do not fit.
    """
    path = weights(place)
    try:
        with _without_optimizer(model):
            model.load_weights(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} does not fit {place / CONFIG}: {reason(error)}"
        ) from None


def save_state(
    place: Path, variables: Sequence[Any], progress: Mapping[str, Any]
) -> None:
    """Writes everything that resuming needs to one file.

    Args:
        place: the run folder.
        variables: Keras variables, told apart by their order.
        progress: what JSON can hold.
    """
    arrays = {str(n): v.numpy() for n, v in enumerate(variables)}
    with atomic_path(place / STATE) as part:
        np.savez(part, progress=json.dumps(progress), **arrays)


def load_progress(place: Path) -> dict[str, Any] | None:
    """Reads how far a run has got; None if it has not begun."""
    path = place / STATE
    if not path.exists():
        return None
    with reading(path, AGAIN), np.load(path) as state:
        return json.loads(str(state["progress"]))


def load_state(place: Path, variables: Sequence[Any]) -> None:
    """Gives variables the values that `save_state` wrote.

    Raises:
        UserError: if they are not the same variables.
    """
    path = place / STATE
    with reading(path, AGAIN), np.load(path) as state:
        values = [state[str(n)] for n in range(len(state.files) - 1)]
    if [each.shape for each in values] != [tuple(v.shape) for v in variables]:
        raise UserError(
            f"{path} belongs to another model: start over with --fresh"
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
