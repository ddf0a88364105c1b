"""Feature cache -> checkpoints/<run>/.

    python train.py
    python train.py --dataset flickr30k --epochs 15
    python train.py --dataset holidays --start-from RUN

Trains the decoder on what preprocess.py left in data/cache/. A run that was
stopped, by whatever means, resumes where it was when the same command is given
again; --fresh starts over and renames the old folder.
--start-from begins with the weights of another run; a lower --learning-rate
keeps more of them.
"""

import dataclasses
import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from captioning import command, job
from config import Config, check_name

ACTIONS = [
    command.Action(
        "--fresh",
        {
            "action": "store_true",
            "default": False,
            "help": "start over; the old run folder is renamed",
        },
    ),
    command.Action(
        "--start-from",
        {
            "type": functools.partial(check_name, "run_name"),
            "metavar": "RUN",
            "default": None,
            "help": "begin with the weights of another run with the same "
            "encoder, such as 'pretrained'",
        },
    ),
    command.Action(
        "--tensorboard",
        {
            "action": "store_true",
            "default": False,
            "help": "log for TensorBoard on JAX too; needs TensorFlow",
        },
    ),
]
# Below this, a user is told that a warm start would help.
FEW_IMAGES = 1000


def main(arguments: command.Arguments) -> None:
    """Trains a run, or resumes it."""
    from captioning import runs
    from captioning.data import prepared
    from captioning.files import lock

    place = runs.folder(arguments.config)
    with job.joined() as process, nullcontext() if process else lock(place):
        fresh = arguments.actions.fresh and place.exists()
        config = arguments.config
        if not fresh:
            config = runs.training_config(config, arguments.given, place)
        config = prepared.settle_tokeniser(config)
        train = prepared.load_split(config, "train")
        val = prepared.load_split(config, "val")
        words = prepared.load_vocabulary(config)
        command.import_keras()
        from captioning import backend

        with backend.all_devices() as devices:
            fit(
                config,
                place,
                train,
                val,
                words,
                devices,
                arguments.actions,
                fresh,
            )
    following = command.next_line("evaluate.py", arguments)
    if "test" not in prepared.splits(config):
        following += " --split val"
    print(f"Wrote {place}. Next: {following}")


def fit(
    config: Config,
    place: Path,
    train: Any,
    val: Any,
    words: Any,
    devices: Any,
    actions: Any,
    fresh: bool,
) -> None:
    """Trains on the training split, and judges by the validation split."""
    from captioning import backend, runs
    from captioning.data import prepared
    from captioning.scoring.metrics import CIDER_IMAGES
    from captioning.training import (
        callbacks,
        loop,
        schedule,
        self_critical,
        warm_start,
    )
    from model import build_model

    backend.set_seed(config.seed)
    epochs = schedule.choose_epochs(len(train.images), config.batch_images)
    # Saved as what they are, so that the run means the same elsewhere.
    config = dataclasses.replace(
        config,
        precision=backend.set_precision(config),
        epochs=config.epochs or epochs,
    )
    start = place.with_name(actions.start_from) if actions.start_from else None
    features, val_features = open_features(
        config, place, train, val, words, devices, start, fresh
    )
    batches, val_batches = loop.make_batches(
        config, (features, val_features), (train, val), words, devices
    )
    decoder = build_model(config, len(words), features.shape[-1])
    progress = runs.load_progress(place)
    if start and not progress:
        warm_start.start_from(decoder, words, start)
    else:
        loop.standardise(decoder, features)

    steps = len(batches)
    scheduled = (progress or {}).get("scheduled_epochs", config.epochs)
    rate = schedule.Schedule(
        config.learning_rate, steps, scheduled, config.warmup_share
    )
    loop.compile_decoder(decoder, config, rate, steps)
    measure = callbacks.ValidationCider(
        config, decoder, val_features, val, words, devices
    )
    judge = callbacks.Judge(
        measure,
        place,
        config.cider_every,
        config.patience,
        config.epochs,
        by_loss=len(val.images) < CIDER_IMAGES,
        writes=devices.process == 0,
    )
    points = callbacks.SavePoints(
        place, batches, judge, scheduled, devices.process == 0
    )
    loop.resume(decoder, points)
    if is_trained(config, points):
        print(f"This run is already trained: {ending(config, points)}")
        return
    print(
        f"Training {place}: {len(features):,} images, {len(words):,} "
        f"{words.tokeniser}, {decoder.count_params():,} weights, "
        f"{config.epochs} epochs, {config.precision}, "
        f"{devices.number} device{'s' if devices.number > 1 else ''}"
    )
    if len(features) < FEW_IMAGES and not start:
        print(
            "This is a small training set. A run that starts from another run "
            "needs fewer images: use --encoder xception --start-from "
            "pretrained."
        )
    if judge.by_loss:
        print(
            f"{len(val.images)} validation images are too few for CIDEr to "
            "tell epochs apart: the validation loss decides which epoch is "
            "best. (Self-critical training has no validation loss and keeps "
            "its last epoch.)"
        )
    points.catch_signals()
    if not crossed(config, points):
        announce_schedule(config, scheduled, rate.afterwards)
        watching = [judge.averaged, judge, points]
        if devices.process == 0:
            watching += callbacks.boards(
                place,
                actions.tensorboard,
                measure,
                prepared.images_dir(config),
            )
        loop.run_epochs(batches, val_batches, watching, points, config.epochs)
    if config.scst_epochs:
        self_critical.train(config, points, features, train.tokens, words)
    elif judge.stopped:
        print(f"Stopped: {ending(config, points)}")
    found = str(judge)
    print(found[0].upper() + found[1:])


def open_features(
    config: Config,
    place: Path,
    train: Any,
    val: Any,
    words: Any,
    devices: Any,
    start: Path | None,
    fresh: bool,
) -> tuple[Any, Any]:
    """Opens the features, and begins the run on them or checks that it did.

    Args:
        config: its encoder fields.
        place: the run folder.
        train: the training split.
        val: the validation split.
        words: the vocabulary.
        devices: that train.
        start: the folder of the run to start from.
        fresh: whether an old run is set aside first, once nothing is missing.

    Returns:
        Those of the training and of the validation images.
    """
    import numpy as np

    from captioning import runs
    from captioning.data import prepared
    from captioning.features.encoder_weights import describe_features
    from captioning.training import warm_start

    described = describe_features(config)
    everything = [*train.images, *val.images]
    opened = prepared.open_features(config, described, everything)
    places = np.arange(len(everything))
    features = opened.select(places[: len(train.images)])
    val_features = opened.select(places[len(train.images) :])
    if start:
        warm_start.check(config, start, described, features.shape[1:])
    if devices.process == 0:
        if fresh:
            print(f"Kept the old run as {runs.set_aside(place)}")
        pixels = prepared.pixel_digests(config, described, train.images)
        images = runs.digest_images(train.images, pixels)
        shape = features.shape[1:]
        runs.begin(config, place, words, described, shape, images, start)
    job.wait("begin")
    return features, val_features


def crossed(config: Config, points: Any) -> bool:
    """Whether the epochs of cross-entropy are done."""
    done = points.self_critical or points.epoch >= config.epochs
    return done or points.judge.stopped


def is_trained(config: Config, points: Any) -> bool:
    """Whether nothing is left to do."""
    done = points.self_critical_epochs() >= config.scst_epochs
    return crossed(config, points) and done


def announce_schedule(
    config: Config, scheduled: int, afterwards: float
) -> None:
    """Says so where the learning rate follows another number of epochs.

    Args:
        config: its epochs.
        scheduled: the epochs over which the rate decays.
        afterwards: the rate of all later epochs.
    """
    if config.epochs == scheduled:
        return
    then = f"it has not fully decayed by epoch {config.epochs}"
    if config.epochs > scheduled:
        then = f"after those it stays at {afterwards:.1e}"
    print(
        f"The learning rate keeps the schedule of {scheduled} epochs that this "
        f"run began with: {then}. For a schedule of {config.epochs}, give "
        "--fresh or another --run-name."
    )


def ending(config: Config, points: Any) -> str:
    """Why a run does not train any further, and what would make it."""
    judge = points.judge
    if points.self_critical:
        why = f"{points.self_critical_epochs()} self-critical epochs are done"
        more = "--scst-epochs (--epochs no longer counts)"
    elif judge.stopped:
        measure = "validation loss" if judge.by_loss else "CIDEr"
        why = (
            f"the last {judge.since_best} measurements, up to epoch "
            f"{points.epoch}, did not improve {measure} (patience "
            f"{config.patience})"
        )
        more = "--patience"
    else:
        why = f"{points.epoch} epochs are done"
        more = "--epochs"
    return f"{why}; {judge}. To train further, raise {more}."


if __name__ == "__main__":
    command.run(main, __doc__, ACTIONS)
