"""Training a run from its features to its best weights, or resuming that."""

import dataclasses
from pathlib import Path

import numpy as np

from captioning import backend, job, runs
from captioning.backend import Devices
from captioning.data import prepared
from captioning.data.prepared import Captions
from captioning.features import store
from captioning.features.encoder_weights import describe_features
from captioning.features.joined import Features
from captioning.scoring.metrics import CIDER_IMAGES
from captioning.training import callbacks, loop, self_critical, warm_start
from captioning.training.batches import CaptionBatches
from captioning.training.callbacks import SavePoints, ValidationCider
from captioning.training.schedule import Schedule, choose_epochs
from config import Config, UserError
from model import CaptioningModel, build_model

# Below this, a user is told that a warm start would help.
FEW_IMAGES = 1000


def fit(
    config: Config,
    place: Path,
    captions: Captions,
    devices: Devices,
    start: Path | None,
    fresh: bool,
    tensorboard: bool,
) -> None:
    """Trains on the training split, and judges by the validation split.

    Args:
        config: from `run_configs.training_config`.
        place: the run folder.
        captions: from `prepared.load_captions`.
        devices: that train.
        start: the folder of the run to start from.
        fresh: whether an old run is set aside first, once nothing is missing.
        tensorboard: whether to log for TensorBoard on JAX, too.
    """
    backend.set_seed(config.seed)
    images = len(captions.train.images)
    # What is settled here is saved: the run means the same elsewhere.
    config = dataclasses.replace(
        config,
        precision=backend.set_precision(config),
        epochs=config.epochs or choose_epochs(images, config.batch_images),
    )
    callbacks.check_boards(tensorboard)
    features = open_features(config, place, captions, devices, start, fresh)
    batches, val_batches = loop.make_batches(
        config, features, captions, devices
    )
    decoder = build_model(config, len(captions.words), features[0].shape[-1])
    measure = ValidationCider(
        config, decoder, features[1], captions.val, captions.words, devices
    )
    points, rate = prepare(
        config, place, decoder, features[0], batches, measure, start
    )
    done = points.cross_entropy_done
    if done and not points.judge.best_epoch:
        raise UserError(
            f"{place} has no weights yet, because no epoch up to "
            f"{points.epoch} was measured: give --epochs {points.epoch + 1} or "
            "more"
        )
    if done and points.self_critical_epochs() >= config.scst_epochs:
        print(f"This run is already trained: {ending(points)}")
        return
    announce(config, place, captions, decoder, points, devices)
    points.catch_signals()
    if not done:
        announce_schedule(config, points.scheduled_epochs, rate.afterwards)
        watching = [points.judge.averaged, points.judge, points]
        if devices.writes:
            folder = prepared.images_dir(config)
            watching += callbacks.boards(place, tensorboard, measure, folder)
        loop.run_epochs(batches, val_batches, watching, points, config.epochs)
    if config.scst_epochs:
        self_critical.train(
            config, points, features[0], captions.train.tokens, captions.words
        )
    elif points.judge.stopped:
        print(f"Stopped: {ending(points)}")
    found = str(points.judge)
    print(found[0].upper() + found[1:])


def open_features(
    config: Config,
    place: Path,
    captions: Captions,
    devices: Devices,
    start: Path | None,
    fresh: bool,
) -> tuple[Features, Features]:
    """Opens the features, and begins the run or checks that it began on them.

    Args:
        config: its encoder fields.
        place: the run folder.
        captions: of the training and the validation split.
        devices: that train.
        start: the folder of the run to start from.
        fresh: whether an old run is set aside first, once nothing is missing.

    Returns:
        Those of the training and of the validation images.
    """
    described = describe_features(config)
    images = captions.train.images
    # Together, because opening a cache reads the names of all its images.
    everything = [*images, *captions.val.images]
    opened = store.open_features(config, described, everything)
    places = np.arange(len(everything))
    features = opened.select(places[: len(images)])
    val_features = opened.select(places[len(images) :])
    shape = features.shape[1:]
    if start:
        warm_start.check(config, start, described, shape)
    if devices.writes:
        if fresh:
            print(f"Kept the old run as {runs.set_aside(place)}")
        pixels = store.pixel_digests(config, described, images)
        seen = runs.digest_images(images, pixels)
        runs.begin(config, place, captions.words, described, shape, seen, start)
    job.wait("begin")
    return features, val_features


def prepare(
    config: Config,
    place: Path,
    decoder: CaptioningModel,
    features: Features,
    batches: CaptionBatches,
    measure: ValidationCider,
    start: Path | None,
) -> tuple[SavePoints, Schedule]:
    """Compiles the decoder, and restores it or gives it its first weights.

    Args:
        config: its training fields.
        place: the run folder.
        decoder: the model.
        features: of the training images.
        batches: of the training split.
        measure: captions the validation split.
        start: the folder of the run to start from.

    Returns:
        Where training stands, and the schedule of the learning rate.
    """
    judge = callbacks.Judge(
        measure,
        place,
        config.cider_every,
        config.patience,
        config.epochs,
        by_loss=len(measure.split.images) < CIDER_IMAGES,
        writes=measure.devices.writes,
    )
    points = SavePoints(place, batches, judge, measure.devices.writes)
    begun = points.restore()
    if start and not begun:
        warm_start.start_from(decoder, measure.words, start)
    elif not begun:
        loop.standardise(decoder, features)
    steps, epochs = len(batches), points.scheduled_epochs
    rate = Schedule(config.learning_rate, steps, epochs, config.warmup_share)
    loop.compile_decoder(decoder, config, rate, steps)
    loop.resume(decoder, points, begun)
    return points, rate


def announce(
    config: Config,
    place: Path,
    captions: Captions,
    decoder: CaptioningModel,
    points: SavePoints,
    devices: Devices,
) -> None:
    """Says what is trained on what, and what to expect of little."""
    images = len(captions.train.images)
    print(
        f"Training {place}: {images:,} images, {len(captions.words):,} "
        f"{captions.words.tokeniser}, {decoder.count_params():,} weights, "
        f"{config.epochs} epochs, {config.precision}, "
        f"{devices.number} device{'s' if devices.number > 1 else ''}"
    )
    if points.epoch or points.batch:
        print(
            f"Resuming in epoch {points.epoch + 1}, after step {points.batch}"
        )
    if images < FEW_IMAGES and not runs.load_description(place).started_from:
        print(
            "This is a small training set. A run that starts from another run "
            "needs fewer images: use --encoder xception --start-from "
            "pretrained."
        )
    if points.judge.by_loss:
        print(
            f"{len(captions.val.images)} validation images are too few for "
            "CIDEr to tell epochs apart: the validation loss decides which "
            "epoch is best. (Self-critical training has no validation loss and "
            "keeps its last epoch.)"
        )


def announce_schedule(
    config: Config, scheduled: int, afterwards: float
) -> None:
    """Says so if the learning rate follows a schedule of another length.

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


def ending(points: SavePoints) -> str:
    """Why a run trains no further, and what would make it train further."""
    judge = points.judge
    if points.self_critical:
        last = points.self_critical_epochs()
        why = f"self-critical epoch {last} was the last"
        more = "--scst-epochs (--epochs no longer counts)"
    elif judge.stopped:
        measure = "validation loss" if judge.by_loss else "CIDEr"
        why = (
            f"the last {judge.since_best} measurements, up to epoch "
            f"{points.epoch}, did not improve {measure} (patience "
            f"{judge.patience})"
        )
        more = "--patience"
    else:
        why = f"epoch {points.epoch} was the last"
        more = "--epochs"
    return f"{why}; {judge}. To train further, raise {more}."
