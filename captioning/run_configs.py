"""Which config counts: what a run was trained with, or what is asked for now.

A run fixes what its result depends on. Values that contradict it are refused;
the free ones come from config.py and the flags.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captioning import runs
from config import OPEN, Config, UserError, defaults, flag, group

# What may change when a run is resumed; its result depends on all other fields
# of these groups.
CHANGEABLE = ("epochs", "patience", "scst_epochs")
# What else evaluate.py and caption.py may be given: which images to caption,
# and where the encoder's weights are now. They apply `limit_images` themselves.
EVALUATED = ("dataset", "layout", "val_share", "test_share", "encoder_weights")


def training_config(
    wanted: Config, given: Mapping[str, Any], place: Path
) -> Config:
    """The config to train with: the run's own, if there is one already.

    Args:
        wanted: what config.py and flags say now.
        given: the fields that were given as flags.
        place: the run folder.

    Raises:
        UserError: if a field has changed that must not, or the folder is not
            a run.
    """
    if not (place / runs.CONFIG).exists():
        runs.refuse_other_folder(place)
        return wanted
    if (place / runs.WEIGHTS).exists() and not (place / runs.STATE).exists():
        raise UserError(
            f"{place} can caption but not resume, because it has no "
            f"{runs.STATE}: give another --run-name, and --start-from "
            f"{place.name} to start from its weights"
        )
    config = runs.load_config(place, training=True)
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
    place = runs.folder(wanted)
    config = runs.load_config(place)
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
    words = runs.load_vocabulary(place)
    for other, its_place in others:
        if (
            other.max_caption_length != config.max_caption_length
            or runs.load_vocabulary(its_place) != words
        ):
            raise UserError(
                f"{place} and {its_place} differ in vocabulary or "
                "max_caption_length: only runs trained on the same captions "
                "with the same data fields can be averaged"
            )
    return found


def together(members: Sequence[tuple[Config, Path]]) -> Path:
    """The folder for what several runs do together: checkpoints/<A>+<B>.

    Raises:
        UserError: if a run of its own has that name.
    """
    places = [place for _, place in members]
    place = places[0].with_name("+".join(each.name for each in places))
    if len(places) > 1 and (place / runs.CONFIG).exists():
        raise UserError(
            f"{place} is itself a run, so averaged runs cannot be evaluated "
            "there: rename it first"
        )
    return place
