"""Feature cache -> checkpoints/<run>/.

    python train.py
    python train.py --dataset flickr30k --epochs 15

Trains the decoder on what preprocess.py left in data/cache/. A run that was
stopped, by whatever means, resumes where it was when the same command is given
again; --fresh starts over and keeps the old folder under another name.
"""

import dataclasses
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from captioning import command, job
from config import Config

ACTIONS = [
    command.Action(
        "--fresh",
        {
            "action": "store_true",
            "default": False,
            "help": "start over; the old run folder gets another name",
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
            config = runs.training_config(
                arguments.config, arguments.given, place
            )
        train = prepared.load_split(config, "train")
        val = prepared.load_split(config, "val")
        words = prepared.load_vocabulary(config)
        if fresh and not process:
            print(f"Kept the old run as {runs.set_aside(place)}")
        command.import_keras()
        from captioning import backend

        with backend.all_devices() as devices:
            tensorboard = arguments.actions.tensorboard
            fit(config, place, train, val, words, devices, tensorboard)
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
    tensorboard: bool,
) -> None:
    """Trains on the training split, watched on the validation split."""
    import model as captioning_model
    from captioning import backend, runs
    from captioning.data import prepared
    from captioning.features.cache import load_digests
    from captioning.scoring.metrics import CIDER_IMAGES
    from captioning.training import callbacks
    from captioning.training.schedule import Schedule

    backend.set_seed(config.seed)
    # Saved as what it is, so that the run means the same on another machine.
    precision = backend.set_precision(config)
    config = dataclasses.replace(config, precision=precision)
    description = captioning_model.describe_features(
        config, config.encoder_weights
    )
    cache, rows = prepared.open_features(config, description, train.images)
    _, val_rows = prepared.open_features(config, description, val.images)
    if devices.process == 0:
        digests = load_digests(cache)[rows]
        runs.begin(
            *(config, place, words, description, cache.features.shape[1:]),
            runs.digest_images(train.images, digests),
        )
    job.wait("begin")
    batches, val_batches = make_batches(
        config, cache, (rows, val_rows), (train, val), words, devices
    )
    decoder = captioning_model.build_model(
        config, len(words), cache.features.shape[-1]
    )
    standardise(decoder, cache, rows)
    progress = runs.load_progress(place) or {}
    scheduled = progress.get("scheduled_epochs", config.epochs)
    rate = Schedule(
        *(config.learning_rate, len(batches), scheduled, config.warmup_share)
    )
    averaged = compile_decoder(config, decoder, len(batches), rate)
    cider = callbacks.MeasureCider(
        cider_on(config, decoder, cache, val_rows, val, words, devices),
        averaged,
        place,
        config.cider_every,
        config.patience,
        config.epochs,
        by_loss=len(val.images) < CIDER_IMAGES,
        writes=devices.process == 0,
    )
    points = callbacks.SavePoints(
        place, batches, cider, scheduled, devices.process == 0
    )
    resume(decoder, points)
    crossed = points.self_critical or points.epoch >= config.epochs
    crossed = crossed or cider.stopped
    if crossed and points.self_critical_epochs() >= config.scst_epochs:
        print(f"This run is trained: {ending(config, points)}")
        return
    print(
        f"Training {place}: {len(rows):,} images, {len(words):,} words, "
        f"{decoder.count_params():,} weights, {precision}, devices: "
        f"{devices.number}"
    )
    if cider.by_loss:
        print(
            f"{len(val.images)} validation images are too few for CIDEr to "
            "tell epochs apart: the validation loss decides which epoch is "
            "best. (Self-critical training has none and keeps its last epoch.)"
        )
    points.catch_signals()
    if not crossed:
        announce_schedule(config, scheduled, rate.afterwards)
        watching = [averaged] if config.ema_epochs else []
        watching += [cider, points]
        if devices.process == 0:
            watching += callbacks.boards(place, tensorboard)
        run_epochs(
            decoder, batches, val_batches, watching, points, config.epochs
        )
    elif not points.self_critical:
        # The state of dropout is part of what has to be as if undisturbed.
        runs.load_state(place, points.variables())
    if config.scst_epochs:
        job.wait("criticise")  # the first process may still be writing
        with backend.one_device():
            if devices.number > 1:
                # Drawing and judging is no work for several devices: each
                # process does all of it, and they agree.
                alone = captioning_model.build_model(
                    config, len(words), cache.features.shape[-1]
                )
                points.set_model(alone)
                cider.measure = cider_on(
                    *(config, alone, cache, val_rows, val, words),
                    backend.ALONE,
                )
            criticise(config, points, cache.features, rows, train, words)
    if cider.stopped and not points.self_critical:
        print(f"Stopped: {ending(config, points)}")
    found = str(cider)
    print(found[0].upper() + found[1:])


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
    then = f"it has not decayed yet by epoch {config.epochs}"
    if config.epochs > scheduled:
        then = f"it stays at {afterwards:.1e} after them"
    print(
        f"The learning rate keeps the schedule of {scheduled} epochs that this "
        f"run began with: {then}. For a schedule of {config.epochs}, give "
        "--fresh or another --run-name."
    )


def ending(config: Config, points: Any) -> str:
    """Why a run does not train any further, and what would make it."""
    cider = points.cider
    if points.self_critical:
        why = f"{points.self_critical_epochs()} self-critical epochs are done"
        more = "--scst-epochs (--epochs no longer counts)"
    elif cider.stopped:
        measure = "validation loss" if cider.by_loss else "CIDEr"
        why = (
            f"the last {cider.since_best} measurements up to epoch "
            f"{points.epoch} brought no better {measure} (patience "
            f"{config.patience})"
        )
        more = "--patience"
    else:
        why = f"{points.epoch} epochs are done"
        more = "--epochs"
    return f"{why}; {cider}. To train further, raise {more}."


def make_batches(
    config: Config,
    cache: Any,
    rows: Any,
    splits: Any,
    words: Any,
    devices: Any,
) -> list[Any]:
    """Batches of the training and of the validation split.

    Args:
        config: its training fields.
        cache: the features.
        rows: the row of each image, int (images,), of both splits.
        splits: both, from `prepared.load_split`.
        words: the vocabulary.
        devices: what shares each batch.
    """
    from captioning.data.vocabulary import encode
    from captioning.training.batches import CaptionBatches

    made = []
    for split_rows, split, seed, number in zip(
        rows,
        splits,
        (config.seed, None),
        (config.captions_per_image, 0),
        strict=True,
    ):
        captions = [
            encode(tokens, words, config.max_caption_length)
            for tokens in split.tokens
        ]
        made.append(
            CaptionBatches(
                cache.features,
                split_rows,
                captions,
                config.batch_images,
                number,
                seed,
                devices=devices,
            )
        )
    return made


def standardise(decoder: Any, cache: Any, rows: Any) -> None:
    """Gives the decoder the statistics of the training features."""
    from captioning.features.cache import channel_statistics

    mean, deviation = channel_statistics(cache.features, rows)
    decoder.standardisation.mean.assign(mean)
    decoder.standardisation.deviation.assign(deviation)


def compile_decoder(config: Config, decoder: Any, steps: int, rate: Any) -> Any:
    """Compiles for training; returns what lends the averaged weights.

    Args:
        config: its training fields.
        decoder: the model.
        steps: per epoch.
        rate: the learning rate, a schedule.
    """
    import model as captioning_model
    from captioning import backend
    from captioning.training.callbacks import Averaged

    average = config.ema_epochs > 0
    optimizer = captioning_model.AdamW(
        rate,
        embedding_rate=config.embedding_rate,
        weight_decay=config.weight_decay,
        global_clipnorm=config.clip_norm or None,
        use_ema=average,
        ema_momentum=math.exp(-1 / (config.ema_epochs * steps))
        if average
        else 0.99,
    )
    decoder.compile(
        optimizer,
        captioning_model.SmoothedCrossEntropy(config.label_smoothing),
        weighted_metrics=[captioning_model.TokenAccuracy()],
        jit_compile=backend.use_xla(),
    )
    if not average:
        return nullcontext()
    averaged = Averaged()
    averaged.set_model(decoder)
    return averaged


def cider_on(
    config: Config,
    decoder: Any,
    cache: Any,
    rows: Any,
    split: Any,
    words: Any,
    devices: Any,
) -> Any:
    """A function that captions a split and gives the CIDEr of it.

    Each process captions its share of the images, on one device.
    """
    import model as captioning_model
    from captioning import backend
    from captioning.decoding import search
    from captioning.scoring import metrics

    captioner = decoder
    with backend.one_device():
        if devices.number > 1:
            captioner = captioning_model.build_model(
                config, len(words), cache.features.shape[-1]
            )
        searcher = search.build(captioner, config)
    references = {
        image: [" ".join(tokens) for tokens in each]
        for image, each in zip(split.images, split.tokens, strict=True)
    }

    def measure() -> float:
        with backend.one_device():
            if captioner is not decoder:
                captioner.set_weights(decoder.get_weights())
            mine = rows[devices.process :: devices.processes]
            found = search.caption_rows(searcher, cache.features, mine, words)
        captions, shares = {}, [[each.caption for each in found]]
        if devices.processes > 1:
            shares = job.gather(shares[0])
        for process, share in enumerate(shares):
            images = split.images[process :: devices.processes]
            captions |= zip(images, share, strict=True)
        return metrics.cider(captions, references)

    return measure


def resume(decoder: Any, points: Any) -> None:
    """Restores a run from its last saved point."""
    decoder.optimizer.build(decoder.trainable_variables)
    points.restore(decoder)
    if points.epoch or points.batch:
        print(f"Resuming after {points.epoch} epochs and {points.batch} steps")
    if points.batch and not points.self_critical:
        # Keras makes its metrics when it first measures, and resets them
        # when it begins to train: the state is taken up after that.
        decoder.test_on_batch(*points.batches[0])


def run_epochs(
    decoder: Any,
    batches: Any,
    val_batches: Any,
    watching: list[Any],
    points: Any,
    epochs: int,
) -> None:
    """Model.fit; an epoch that was begun is finished by a fit of its own."""
    from captioning import runs

    ends = [points.epoch + 1, epochs] if points.batch else [epochs]
    for end in ends:
        if points.epoch >= end or decoder.stop_training:
            break
        if points.epoch and not points.batch:
            # Also before the second fit: Keras leaves the averaged weights
            # in place at the end of the first.
            runs.load_state(points.place, points.variables())
        batches.begin(points.epoch, points.batch)
        decoder.fit(
            batches,
            validation_data=val_batches,
            initial_epoch=points.epoch,
            epochs=end,
            callbacks=watching,
            # The batches have their own order; Keras would draw another one,
            # which a run that goes on could not draw again.
            shuffle=False,
            # A bar for a person, a line an epoch for a log.
            verbose=1 if sys.stdout.isatty() else 2,
        )


def criticise(
    config: Config,
    points: Any,
    features: Any,
    rows: Any,
    train: Any,
    words: Any,
) -> None:
    """Self-critical training, from the best epoch of cross-entropy on."""
    from captioning import runs
    from captioning.training import self_critical

    decoder, cider = points.model, points.cider
    self_critical.compile_decoder(config, decoder)
    decoder.optimizer.build(decoder.trainable_variables)
    cider.set_model(decoder)
    cider.averaged = nullcontext()
    if points.self_critical:
        runs.load_state(points.place, points.variables())
    else:
        runs.load_weights(decoder, points.place)
        points.cross_entropy_epochs = points.epoch
        # With fewer epochs than before, one may have been left half-way.
        points.batch, points.seconds = 0, 0.0
        # A run that is killed shall not begin from weights that became the
        # best ones meanwhile.
        points.start(points.epoch)
        points.save()
    rounds = self_critical.Rounds(
        config, decoder, features, rows, train.tokens, words
    )
    end = points.cross_entropy_epochs + config.scst_epochs
    for epoch in range(points.epoch, end):
        points.start(epoch)
        run_rounds(decoder, rounds, points)
        logs = {"reward": sum(points.rewards) / len(rounds)}
        cider.judge(epoch, logs)
        points.on_epoch_end(epoch, logs)
        print(
            f"Self-critical epoch {epoch + 1}/{end}: reward "
            f"{logs['reward']:.3f}, CIDEr on val {logs['val_cider']:.3f}",
            flush=True,
        )


def run_rounds(decoder: Any, rounds: Any, points: Any) -> None:
    """The rounds that are left of an epoch: draws captions, learns of them."""
    from tqdm import tqdm

    bar = tqdm(
        total=len(rounds),
        initial=points.batch,
        unit="round",
        disable=not sys.stderr.isatty(),
    )
    with bar:
        while points.batch < len(rounds):
            batches, reward = rounds.draw(points.epoch, points.batch)
            fitted = decoder.fit(batches, shuffle=False, verbose=0)
            points.batch += 1
            points.rewards.append(reward)
            points.check(fitted.history["loss"][0])
            if points.batch < len(rounds):
                points.save_if_due()
            bar.set_postfix(reward=f"{reward:.3f}")
            bar.update()


if __name__ == "__main__":
    command.run(main, __doc__, ACTIONS)
