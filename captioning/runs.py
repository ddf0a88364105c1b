"""The run folder: config, vocabulary, weights, and what resuming needs."""

import contextlib
import dataclasses
import hashlib
import json
import sys
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
from config import (
    FIELDS,
    OPEN,
    SAMPLE,
    Config,
    UserError,
    defaults,
    flag,
    group,
)

# What may change when a run is resumed; its result depends on all other fields
# of these groups.
CHANGEABLE = ("epochs", "patience", "scst_epochs")
# What else evaluate.py and caption.py may be given: which images to caption,
# and where the encoder's weights are now. `limit_images` is theirs to obey.
EVALUATED = ("dataset", "layout", "val_share", "test_share", "encoder_weights")
UNKNOWN_PIXELS = "0" * 16
# The files of a run folder; each is read in one function and written in one.
CONFIG, VOCABULARY = "config.json", "vocabulary.json"
FEATURES, IMAGES = "features.json", "training_images.csv"
WEIGHTS, STATE = "model.weights.h5", "last/state.npz"
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
            f"photographs: train one, or get {checkpoints_dir}/{PRETRAINED} "
            "back with git checkout"
        )
    return max(found)[-1]


def set_aside(place: Path) -> Path:
    """Renames a run folder out of the way; returns its new path.

    Raises:
        UserError: if it is no run.
    """
    _refuse_other_folder(place)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return place.rename(place.with_name(f"{place.name}-before-{stamp}"))


def _refuse_other_folder(place: Path) -> None:
    """Refuses to make a run of a folder that has files of somebody else.

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


def _reading(path: Path) -> contextlib.AbstractContextManager[None]:
    return reading(path, "start over with train.py --fresh")


# --- which config counts -----------------------------------------------------


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
    with _reading(path):
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


def training_config(
    wanted: Config, given: Mapping[str, Any], place: Path
) -> Config:
    """The config to train with: the run's own, if there is one already.

    Args:
        wanted: what config.py and flags say now.
        given: the fields that were given as flags.
        place: the run folder.

    Raises:
        UserError: if a field has changed that must not, or the folder is no
            run.
    """
    if not (place / CONFIG).exists():
        _refuse_other_folder(place)
        return wanted
    if (place / WEIGHTS).exists() and not (place / STATE).exists():
        raise UserError(
            f"{place} can caption but not resume, because it has no {STATE}: "
            f"give another --run-name, and --start-from {place.name} to start "
            "from its weights"
        )
    config = load_config(place, training=True)
    _keep(config, given, group("model"), place)
    _note_defaults(config)
    fixed = [*group("data"), *group("encoder"), *group("training")]
    fixed = [name for name in fixed if name not in CHANGEABLE]
    _keep(config, dataclasses.asdict(wanted), fixed, place)
    free = [*CHANGEABLE, *group("place"), *group("decoding")]
    closed = [n for n in free if getattr(wanted, n) != OPEN.get(n)]
    return _with(config, wanted, closed)


def decoding_config(
    wanted: Config, given: Mapping[str, Any]
) -> tuple[Config, Path]:
    """The config of a trained run, with today's decoding fields.

    Those that were not given are the defaults of the run's dataset. Its
    precision is the one that the run was trained in, unless another one
    was given.

    Args:
        wanted: what config.py and flags say now.
        given: the fields that were given as flags.

    Returns:
        The config and the run folder.

    Raises:
        UserError: if there is no such run, or a flag contradicts it.
    """
    place = folder(wanted)
    config = load_config(place)
    fixed = [*group("model"), *group("data"), *group("encoder")]
    free = [*EVALUATED, "limit_images"]
    _keep(config, given, [name for name in fixed if name not in free], place)
    _note_defaults(config)
    config = _with(config, defaults(config.dataset), group("decoding"))
    names = [*group("place"), *(n for n in group("decoding") if n in given)]
    names += [n for n in EVALUATED if given.get(n, OPEN.get(n)) != OPEN.get(n)]
    if "precision" in given:  # `auto` is that of this machine
        names.append("precision")
    if "dataset_dir" in given:
        names.append("dataset")  # which may be named by its folder
    return _with(config, wanted, names), place


def _keep(
    config: Config, values: Mapping[str, Any], names: Sequence[str], place: Path
) -> None:
    """Refuses values that contradict a run; those left open do not."""
    for name in names:
        old = getattr(config, name)
        new = values.get(name, old)
        if new not in (old, OPEN.get(name)):
            raise UserError(
                f"{name} is {old!r} in the run {place}, not {new!r}: give "
                f"{flag(name)} {old}, or train another run with train.py "
                "--fresh or --run-name"
            )


def _note_defaults(config: Config) -> None:
    """Tells which defaults of the model have been edited since."""
    now = defaults(config.dataset)
    for name in group("model"):
        value, default = getattr(config, name), getattr(now, name)
        if value != default:
            print(
                f"Note: {name} is {value!r} in this run and {default!r} in "
                "config.py; the run's value is used.",
                file=sys.stderr,
            )


def _with(config: Config, other: Config, names: Sequence[str]) -> Config:
    """A config with some fields of another one."""
    values = {name: getattr(other, name) for name in names}
    return dataclasses.replace(config, **values)


def members(
    wanted: Config, given: Mapping[str, Any], names: Sequence[str]
) -> list[tuple[Config, Path]]:
    """The runs whose probabilities are averaged; usually a single one.

    Args:
        wanted: what config.py and flags say now.
        given: the fields that were given as flags.
        names: of the runs; none takes the one that the config names.

    Returns:
        What `decoding_config` returns, for each run.

    Raises:
        UserError: if a run is missing, or the runs differ in their vocabulary.
    """
    if not names:
        return [decoding_config(wanted, given)]
    if "run_name" in given:
        raise UserError(
            "--runs and --run-name contradict each other: leave one out"
        )
    found = [
        decoding_config(dataclasses.replace(wanted, run_name=name), given)
        for name in names
    ]
    (config, place), *others = found
    words = vocabulary.load(place / VOCABULARY)
    for other, its_place in others:
        if (
            other.max_caption_length != config.max_caption_length
            or vocabulary.load(its_place / VOCABULARY) != words
        ):
            raise UserError(
                f"{place} and {its_place} differ in vocabulary or "
                "max_caption_length: only runs trained on the same captions "
                "with the same data fields can be averaged"
            )
    return found


def together(runs: Sequence[tuple[Config, Path]]) -> Path:
    """The folder for what several runs do together: checkpoints/<A>+<B>.

    Raises:
        UserError: if a run of its own has that name.
    """
    places = [place for _, place in runs]
    place = places[0].with_name("+".join(each.name for each in places))
    if len(places) > 1 and (place / CONFIG).exists():
        raise UserError(
            f"{place} is a run of its own, so averaged runs cannot be "
            "evaluated there: rename it first"
        )
    return place


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
            "vocabulary has": vocabulary.load(place / VOCABULARY) == words,
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
    with _reading(path):
        fields = json.loads(path.read_text(encoding="utf-8"))
        regions, channels = fields["shape"]
        return Description(
            fields["encoders"], (regions, channels), fields["started_from"]
        )


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
    with _reading(path):
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
    """Writes the best weights, and in the same file the epoch they are of."""
    with atomic_path(place / WEIGHTS) as part, _without_optimizer(model):
        model.save_weights(part)
        with h5py.File(part, "a") as file:
            file.attrs["epoch"] = epoch


def best_epoch(place: Path) -> int | None:
    """The epoch that the weights of a run are of, counted from 1."""
    try:
        with h5py.File(place / WEIGHTS) as file:
            return int(file.attrs["epoch"])
    except (OSError, KeyError):
        return None


def load_weights(model: Any, place: Path) -> None:
    """Reads the best weights.

    Raises:
        UserError: if there are none, or they do not fit.
    """
    path = place / WEIGHTS
    if not path.exists():
        raise UserError(
            f"{path} does not exist yet: train.py writes it when it first "
            "measures CIDEr; run train.py to the end"
        )
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
    with _reading(path), np.load(path) as state:
        return json.loads(str(state["progress"]))


def load_state(place: Path, variables: Sequence[Any]) -> None:
    """Gives variables the values that `save_state` wrote.

    Raises:
        UserError: if they are not the same variables.
    """
    path = place / STATE
    with _reading(path), np.load(path) as state:
        values = [state[str(n)] for n in range(len(state.files) - 1)]
    if [each.shape for each in values] != [tuple(v.shape) for v in variables]:
        raise UserError(
            f"{path} belongs to another model: start over with --fresh"
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
