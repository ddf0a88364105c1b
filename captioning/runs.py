"""The run folder: config, vocabulary, weights, and what resuming needs."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from captioning.command import Arguments
from captioning.data import vocabulary
from captioning.files import atomic_path, write_text
from config import OPEN, Config, UserError, group

# What a run that goes on may change; every other field of these groups is
# part of what the result depends on.
CHANGEABLE = ("epochs", "patience", "scst_epochs")
# What else evaluate.py and caption.py may be given: which images to look at,
# and where the encoder's weights are now. `limit_images` is theirs to obey.
EVALUATED = ("dataset", "layout", "val_share", "test_share", "encoder_weights")


def folder(config: Config) -> Path:
    """The folder of the run that a resolved config names."""
    return Path(config.checkpoints_dir) / config.run_name


def save_config(config: Config, place: Path) -> None:
    """Writes the config that trains a run."""
    text = json.dumps(dataclasses.asdict(config), indent=2)
    write_text(place / "config.json", text + "\n")


def load_config(place: Path) -> Config:
    """Reads the config that trained a run.

    Raises:
        UserError: if there is none, or it is not one.
    """
    path = place / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        known = {each.name for each in dataclasses.fields(Config)}
        return Config(**{k: v for k, v in fields.items() if k in known})
    except FileNotFoundError:
        raise UserError(_no_run(place)) from None
    except (ValueError, AttributeError, UserError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): train the run anew with "
            "train.py --fresh"
        ) from None


def _no_run(place: Path) -> str:
    text = f"there is no trained run in {place}: run train.py first"
    runs = [path.parent.name for path in place.parent.glob("*/config.json")]
    if runs:
        text += f", or give --run-name (there are {', '.join(sorted(runs))})"
    return text


def training_config(arguments: Arguments, place: Path) -> Config:
    """The config to train with: that of the run, if there is one already.

    Raises:
        UserError: if a field that a run may not change has changed.
    """
    if not (place / "config.json").exists():
        return arguments.config
    config, wanted = load_config(place), arguments.config
    _keep_model(arguments, config, place)
    fixed = [*group("data"), *group("encoder"), *group("training")]
    for name in fixed:
        old, new = getattr(config, name), getattr(wanted, name)
        # What is left open is what the run has.
        if old != new and new != OPEN.get(name) and name not in CHANGEABLE:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{name} is {old!r} in the run {place} and {new!r} now: give "
                f"{flag} {old} to go on with it, --fresh to start it over, "
                "or another --run-name"
            )
    return _with(
        config, wanted, [*CHANGEABLE, *group("place"), *group("decoding")]
    )


def decoding_config(arguments: Arguments) -> tuple[Config, Path]:
    """The config of a trained run, with the decoding that is asked for now.

    Returns:
        The config and the run's folder.

    Raises:
        UserError: if there is no such run, or a flag contradicts it.
    """
    wanted = arguments.config
    place = folder(wanted)
    config = load_config(place)
    _keep_model(arguments, config, place)
    for name in [*group("data"), *group("encoder")]:
        if name not in (*EVALUATED, "limit_images"):
            _refuse_other(arguments, config, name, place)
    asked = [name for name in EVALUATED if name in _chosen(arguments)]
    if "dataset_dir" in arguments.given:
        asked.append("dataset")  # which may be named by its folder
    names = [*group("place"), *group("decoding"), "precision", *asked]
    return _with(config, wanted, names), place


def members(
    arguments: Arguments, names: list[str]
) -> list[tuple[Config, Path]]:
    """The runs whose probabilities are averaged; one is the usual case.

    Args:
        arguments: the command line.
        names: of the runs; none takes the one that the config names.

    Returns:
        For each run what `decoding_config` gives.

    Raises:
        UserError: if a run is not there, or they do not write one language.
    """
    if not names:
        return [decoding_config(arguments)]
    if "run_name" in arguments.given:
        raise UserError(
            "--runs and --run-name contradict each other: leave one out"
        )
    found = []
    for name in names:
        config = dataclasses.replace(arguments.config, run_name=name)
        found.append(decoding_config(arguments._replace(config=config)))
    (config, place), *others = found
    for other, folder_ in others:
        same = {
            "vocabulary": vocabulary.load(place / "vocabulary.json")
            == vocabulary.load(folder_ / "vocabulary.json"),
            "max_caption_length": config.max_caption_length
            == other.max_caption_length,
        }
        for what, is_so in same.items():
            if not is_so:
                raise UserError(
                    f"{place} and {folder_} differ in their {what}: only runs "
                    "trained on the same captions with the same data fields "
                    "can be averaged"
                )
    return found


def together(runs: list[tuple[Config, Path]]) -> Path:
    """The folder for what several runs do together: checkpoints/<A>+<B>."""
    places = [place for _, place in runs]
    return places[0].with_name("+".join(place.name for place in places))


def _with(config: Config, other: Config, names: list[str]) -> Config:
    values = {name: getattr(other, name) for name in names}
    return dataclasses.replace(config, **values)


def _keep_model(arguments: Arguments, config: Config, place: Path) -> None:
    """Holds to the model fields of a run, whatever flags and defaults say."""
    for name in group("model"):
        _refuse_other(arguments, config, name, place)
        _notice_default(config, name)


def _chosen(arguments: Arguments) -> dict[str, Any]:
    """The fields that were given and whose value leaves no choice open."""
    return {
        name: value
        for name, value in arguments.given.items()
        if name not in OPEN or value != OPEN[name]
    }


def _refuse_other(
    arguments: Arguments, config: Config, name: str, place: Path
) -> None:
    """Refuses a flag that contradicts the run."""
    value = getattr(config, name)
    given = _chosen(arguments).get(name, value)
    if given != value:
        raise UserError(
            f"{name} is {value!r} in the run {place}, not "
            f"{given!r}: leave the flag out, or train another "
            "run with --run-name"
        )


def _notice_default(config: Config, name: str) -> None:
    """Tells of a default that has been edited since."""
    value, default = getattr(config, name), getattr(Config(), name)
    if value != default:
        print(
            f"Note: {name} is {value!r} in this run and {default!r} in "
            "config.py; the run's counts.",
            file=sys.stderr,
        )


def set_aside(place: Path) -> Path:
    """Gives a run folder another name; returns it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = place.with_name(f"{place.name}-before-{stamp}")
    place.rename(aside)
    return aside


def begin(
    config: Config,
    place: Path,
    words: vocabulary.Vocabulary,
    description: dict[str, Any],
    shape: tuple[int, ...],
) -> None:
    """Writes what a run depends on, or holds it against what it was.

    Args:
        config: what trains it.
        place: the run folder.
        words: of the training split.
        description: of the features, from `features.describe`.
        shape: of an image's features, (regions, channels).

    Raises:
        UserError: if the run was begun with other words or features.
    """
    if (place / "last" / "state.npz").exists():
        known = vocabulary.load(place / "vocabulary.json")
        for what, same in {
            "vocabulary": known == words,
            "encoder": load_description(place) == (description, tuple(shape)),
        }.items():
            if not same:
                raise UserError(
                    f"the {what} has changed since {place} was begun: give "
                    "--fresh to start it over, or another --run-name"
                )
    text = json.dumps({**description, "shape": shape}, indent=2)
    write_text(place / "features.json", text + "\n")
    vocabulary.save(words, place / "vocabulary.json")
    save_config(config, place)


def load_description(place: Path) -> tuple[dict[str, Any], tuple[int, int]]:
    """Reads which features a run was trained on: description and shape."""
    path = place / "features.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        regions, channels = description.pop("shape")
        return description, (regions, channels)
    except (
        *(OSError, ValueError, KeyError),
        *(AttributeError, TypeError),
    ) as error:
        raise UserError(
            f"{path} cannot be read ({error}): train the run anew with "
            "train.py --fresh"
        ) from None


def save_weights(model: Any, place: Path) -> None:
    """Writes the best weights."""
    path = place / "model.weights.h5"
    with atomic_path(path) as part, _without_optimizer(model):
        model.save_weights(part)


@contextlib.contextmanager
def _without_optimizer(model: Any) -> Iterator[None]:
    """Hides the optimizer, whose state is three times as large, from Keras."""
    optimizer, model.optimizer = getattr(model, "optimizer", None), None
    try:
        yield
    finally:
        model.optimizer = optimizer


def load_weights(model: Any, place: Path) -> None:
    """Reads the best weights.

    Raises:
        UserError: if there are none, or they do not fit.
    """
    path = place / "model.weights.h5"
    if not path.exists():
        raise UserError(
            f"{path} is not there yet: train.py writes it when it first "
            "measures CIDEr; run it to the end"
        )
    try:
        with _without_optimizer(model):
            model.load_weights(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} does not fit {place / 'config.json'}: {reason}"
        ) from None


def save_state(
    place: Path, variables: list[Any], progress: dict[str, Any]
) -> None:
    """Writes all that resuming needs as one file.

    Args:
        place: the run folder.
        variables: Keras variables; their order says which is which.
        progress: what JSON can hold.
    """
    arrays = {str(n): v.numpy() for n, v in enumerate(variables)}
    with atomic_path(place / "last" / "state.npz") as part:
        np.savez(part, progress=json.dumps(progress), **arrays)


def load_progress(place: Path) -> dict[str, Any] | None:
    """Reads how far a run has come; None if it has not begun."""
    path = place / "last" / "state.npz"
    if not path.exists():
        return None
    try:
        with np.load(path) as state:
            return json.loads(str(state["progress"]))
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({error}): start over with --fresh"
        ) from None


def load_state(place: Path, variables: list[Any]) -> None:
    """Gives variables the values that `save_state` wrote.

    Raises:
        UserError: if they are not the same variables.
    """
    path = place / "last" / "state.npz"
    try:
        with np.load(path) as state:
            values = [state[str(n)] for n in range(len(state.files) - 1)]
    except Exception as error:  # zipfile and numpy raise many kinds
        raise UserError(
            f"{path} cannot be read ({error}): start over with --fresh"
        ) from None
    if [each.shape for each in values] != [tuple(v.shape) for v in variables]:
        raise UserError(
            f"{path} belongs to another model: start over with --fresh"
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
