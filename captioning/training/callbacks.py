"""What happens between the batches of Model.fit: measuring and saving."""

import dataclasses
import importlib.util
import signal
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd

from captioning import job, runs
from captioning.backend import ALONE, TENSORFLOW, Devices, one_device
from captioning.data.images import UnusableImage, read_image
from captioning.data.prepared import Split
from captioning.data.vocabulary import Vocabulary
from captioning.decoding import captioner
from captioning.features.joined import Features
from captioning.files import reading, write_csv
from captioning.scoring import metrics
from captioning.scoring.figures import (
    PHOTO_SIDE,
    draw_attention,
    write_curves,
)
from captioning.training.batches import CaptionBatches
from config import Config, UserError
from model import build_model

SHOWN = 4  # validation images in TensorBoard
SAVE_SECONDS = 180  # between two saved points within an epoch
# What a saved point has of `Judge`, and of `SavePoints`.
BEST = ("best", "best_loss", "best_epoch", "since_best")
KEPT = (
    "epoch",
    "batch",
    "seconds",
    "history",
    "cross_entropy_epochs",
    "rewards",
    "scheduled_epochs",
)


class Averaged(keras.callbacks.Callback):
    """Evaluates the optimizer's averaged weights; trains the raw ones.

    Keras's `SwapEMAWeights` exchanges the two by adding and subtracting on
    TensorFlow, which rounds, and `Model.fit` leaves the average in the model.
    Here the trained weights are put back as they were, to the bit. Does
    nothing where the optimizer keeps no average.
    """

    def on_test_begin(self, logs: Any = None) -> None:
        """Puts the averaged weights in place."""
        self.trained = self._copies()
        variables = self.model.trainable_variables
        self.model.optimizer.finalize_variable_values(variables)

    def on_test_end(self, logs: Any = None) -> None:
        """Puts the trained weights back."""
        self._restore(self.trained)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Remembers the weights that the next `fit` has to start from."""
        self.last = self._copies()

    def on_train_end(self, logs: Any = None) -> None:
        """Undoes what `Model.fit` does at its end."""
        self._restore(self.last)

    def __enter__(self) -> None:
        """As for a validation."""
        self.on_test_begin()

    def __exit__(self, *_: Any) -> None:
        """As after a validation."""
        self.on_test_end()

    def _copies(self) -> list[Any]:
        return [*map(keras.ops.copy, self.model.trainable_variables)]

    def _restore(self, values: list[Any]) -> None:
        for variable, value in zip(
            self.model.trainable_variables, values, strict=True
        ):
            variable.assign(value)


class ValidationCider:
    """Captions the validation split freely, and scores that by CIDEr.

    Args:
        config: its decoding fields; nothing is sampled.
        decoder: the model that is trained.
        features: of the validation split.
        split: its images and captions.
        words: the vocabulary.
        devices: that training uses. Each process captions its share of the
            images, on one device.
    """

    def __init__(
        self,
        config: Config,
        decoder: keras.Model,
        features: Features,
        split: Split,
        words: Vocabulary,
        devices: Devices = ALONE,
    ) -> None:
        self.decoder, self.devices = decoder, devices
        self.features, self.split, self.words = features, split, words
        with one_device():
            self.captioner = decoder
            if devices.number > 1:
                self.captioner = build_model(
                    config, len(words), features.shape[-1]
                )
            # Sampling would take as long as an epoch.
            quick = dataclasses.replace(config, consensus_samples=0)
            self.search = captioner.build(self.captioner, quick)

    def __call__(self) -> float:
        """CIDEr with the current weights.

        Keeps in `first` what was found for the first images.
        """
        process, processes = self.devices.process, self.devices.processes
        with one_device():
            if self.captioner is not self.decoder:
                self.captioner.set_weights(self.decoder.get_weights())
            mine = np.arange(len(self.features))[process::processes]
            found = captioner.caption_images(
                self.search, [self.features], mine, self.words
            )
        self.first = found[:SHOWN]  # process 0 has the first images
        shares = [[" ".join(each.words) for each in found]]
        if processes > 1:
            shares = job.gather(shares[0])
        images = self.split.images
        captions: dict[str, str] = {}
        for first, share in enumerate(shares):
            captions |= zip(images[first::processes], share, strict=True)
        references = {
            image: [" ".join(tokens) for tokens in each]
            for image, each in zip(images, self.split.tokens, strict=True)
        }
        return metrics.cider(captions, references)


class Judge(keras.callbacks.Callback):
    """Adds `val_cider`, of free-running captions, to an epoch's logs.

    Keeps the weights of the best epoch, and stops when no better one comes.
    The best epoch has the highest CIDEr and, among equal ones, the lowest
    validation loss. Where the validation split is too small for CIDEr, the
    validation loss decides alone. Self-critical training has no such loss:
    there, its last epoch is kept.

    Args:
        measure: captions the validation split, and returns its CIDEr.
        place: the run folder.
        every: epochs between measurements.
        patience: stop after this many measurements without a better one.
        epochs: how many epochs there are; it also measures after the last.
        by_loss: whether the validation loss decides alone.
        writes: whether this process saves the weights.
    """

    def __init__(
        self,
        measure: ValidationCider,
        place: Path,
        every: int,
        patience: int,
        epochs: int,
        by_loss: bool = False,
        writes: bool = True,
    ) -> None:
        super().__init__()
        self.measure, self.place, self.writes = measure, place, writes
        self.every, self.patience, self.epochs = every, patience, epochs
        self.by_loss = by_loss
        self.averaged: Any = Averaged()
        self.best, self.best_loss = -1.0, float("inf")
        self.best_epoch, self.since_best = 0, 0

    def set_model(self, model: keras.Model) -> None:
        """Sets the model that is judged."""
        super().set_model(model)
        self.averaged.set_model(model)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Judges, every few epochs and after the last one."""
        if (epoch + 1) % self.every == 0 or epoch + 1 == self.epochs:
            with self.averaged:
                self.judge(epoch, logs)

    def judge(self, epoch: int, logs: dict[str, float]) -> None:
        """Measures, and keeps the weights if they are the best."""
        logs["val_cider"] = self.measure()
        better = self.is_better(logs)
        if better and self.writes:
            with one_device():  # the others do not take part
                runs.save_weights(self.model, self.place, epoch + 1)
        tie = logs["val_cider"] == self.best and not self.by_loss
        if better:
            self.best, self.best_epoch = logs["val_cider"], epoch + 1
            self.best_loss = logs.get("val_loss", float("inf"))
            self.since_best = 0
        elif not tie:
            self.since_best += 1
        self.model.stop_training = self.stopped

    def is_better(self, logs: dict[str, float]) -> bool:
        """Whether an epoch is better than all before it."""
        loss = logs.get("val_loss")
        if self.by_loss:
            return loss is None or loss < self.best_loss
        if logs["val_cider"] != self.best:
            return logs["val_cider"] > self.best
        return loss is not None and loss < self.best_loss

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return self.since_best >= self.patience

    def __str__(self) -> str:
        """The best epoch, for people."""
        if not self.by_loss:
            found = f"best CIDEr on val: {self.best:.3f}"
        elif self.best_loss < float("inf"):
            found = f"lowest loss on val: {self.best_loss:.3f}"
        else:
            found = "kept the last weights"
        return f"{found}, epoch {self.best_epoch}"


class SavePoints(keras.callbacks.Callback):
    """Saves all that an exact resume needs, and the history.

    A killed run resumes at its last saved point as if nothing had happened:
    weights, optimizer, random state, data order, position in the epoch and
    running means are all saved.

    Args:
        place: the run folder.
        batches: the training batches.
        judge: holds the best score.
        writes: whether this process saves.
    """

    def __init__(
        self,
        place: Path,
        batches: CaptionBatches,
        judge: Judge,
        writes: bool = True,
    ) -> None:
        super().__init__()
        self.writes = writes
        self.place, self.batches, self.judge = place, batches, judge
        # The epochs over which the learning rate decays.
        self.scheduled_epochs = judge.epochs
        self.epoch, self.batch, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, float]] = []
        self.interrupted = False
        # Epochs of cross-entropy before self-critical training began.
        self.cross_entropy_epochs: int | None = None
        self.rewards: list[float] = []  # of the rounds of this epoch

    @property
    def self_critical(self) -> bool:
        """Whether self-critical training has begun."""
        return self.cross_entropy_epochs is not None

    @property
    def cross_entropy_done(self) -> bool:
        """Whether the epochs of cross-entropy are done."""
        done = self.self_critical or self.epoch >= self.judge.epochs
        return done or self.judge.stopped

    def self_critical_epochs(self) -> int:
        """How many epochs of it are done."""
        if self.cross_entropy_epochs is None:
            return 0
        return self.epoch - self.cross_entropy_epochs

    def begin_self_critical(self) -> None:
        """Ends cross-entropy, and saves the weights to go on from.

        With fewer epochs than before, one may have been left half-way. A
        killed run must not resume from weights that became the best later.
        """
        self.cross_entropy_epochs = self.epoch
        self.batch, self.seconds = 0, 0.0
        self.start(self.epoch)
        self.save()

    def variables(self) -> list[Any]:
        """All variables that a step changes, in one order."""
        model = self.model
        # Between the rounds of self-critical training nothing is running.
        inside = self.batch and not self.self_critical
        running = model.metrics_variables if inside else []
        return [*model.variables, *model.optimizer.variables, *running]

    def restore(self) -> bool:
        """Reads where a run stands; returns whether it has begun."""
        progress = runs.load_progress(self.place)
        if progress is None:
            return False
        with reading(self.place / runs.STATE, runs.AGAIN):
            for name in BEST:
                setattr(self.judge, name, progress[name])
            for name in KEPT:
                setattr(self, name, progress[name])
        if not (self.epoch or self.batch):  # no step has followed the old one
            self.scheduled_epochs = self.judge.epochs
        return True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Sets the data order, and in the middle of an epoch the state."""
        self.start(epoch)
        self.batches.begin(epoch, self.batch)
        if self.batch:
            runs.load_state(self.place, self.variables())

    def start(self, epoch: int) -> None:
        """Starts the clock of an epoch, or of the rest of one."""
        self.begun = self.saved = time.monotonic()
        if epoch != self.epoch:
            self.epoch, self.batch, self.seconds = epoch, 0, 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stops a run whose loss is not a number; saves now and then."""
        self.batch += 1
        self.check(logs["loss"])
        if self.batch < len(self.batches.order):
            self.save_if_due()

    def check(self, loss: float) -> None:
        """Stops a run whose loss is not a number."""
        if not np.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.batch} of epoch "
                f"{self.epoch + 1}: the last saved state is kept; try a lower "
                "--learning-rate, or --precision float32"
            )

    def save_if_due(self) -> None:
        """Saves now and then, and ends a run that was asked to end."""
        due = time.monotonic() - self.saved > SAVE_SECONDS
        if due or self.interrupted:
            self.save()
        if self.interrupted:
            raise KeyboardInterrupt

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Writes the history and saves."""
        row = {"epoch": epoch + 1, **logs}
        row["learning_rate"] = float(self.model.optimizer.learning_rate)
        row["seconds"] = self.seconds + time.monotonic() - self.begun
        self.history.append({k: float(v) for k, v in row.items()})
        if self.writes:
            table = history_table(self.history)
            write_csv(self.place / "history.csv", table)
            write_curves(
                self.place / "curves.png", table, self.judge.best_epoch
            )
        self.epoch, self.batch, self.seconds = epoch + 1, 0, 0.0
        self.rewards = []
        self.begun = time.monotonic()
        self.save()
        if self.interrupted:
            raise KeyboardInterrupt

    def save(self) -> None:
        """Writes a saved point."""
        self.saved = time.monotonic()
        if not self.writes:
            return
        progress = {
            **{name: getattr(self.judge, name) for name in BEST},
            **{name: getattr(self, name) for name in KEPT},
            "seconds": self.seconds + time.monotonic() - self.begun,
        }
        with one_device():  # the others do not take part
            runs.save_state(self.place, self.variables(), progress)

    def catch_signals(self) -> None:
        """Lets Ctrl-C and SIGTERM end the run at its next safe point."""

        def interrupt(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print(
                "\nSaving before exit; press Ctrl-C again to exit at once.",
                flush=True,
            )

        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)


class ShownCaptions(keras.callbacks.Callback):
    """Shows captions of some validation images in TensorBoard.

    Args:
        measure: captions the validation split, before this callback.
        images_dir: where the photographs are.
        place: the folder of TensorBoard's logs.
    """

    def __init__(
        self, measure: ValidationCider, images_dir: Path, place: Path
    ) -> None:
        super().__init__()
        self.measure, self.images_dir, self.place = measure, images_dir, place

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Draws the captions and where the model looked, if it captioned."""
        if "val_cider" not in logs:
            return
        import tensorflow as tf  # which JAX does without

        writer = tf.summary.create_file_writer(str(self.place / "captions"))
        shown = zip(self.measure.split.images, self.measure.first, strict=False)
        with writer.as_default():
            for name, found in shown:
                try:
                    path = self.images_dir / name
                    photo, _ = read_image(path, PHOTO_SIDE, square=False)
                except UnusableImage:  # it was still there a while ago
                    continue
                picture = draw_attention(photo, found.words, found.attention)
                step = epoch + 1  # a tag holds one kind of summary
                tf.summary.image(f"{name}/attention", picture[None], step=step)
                tf.summary.text(f"{name}/caption", found.caption, step=step)
        writer.close()


def check_boards(asked: bool) -> None:
    """Checks that TensorBoard can be logged for, if that was asked for.

    Raises:
        UserError: if TensorFlow is not installed.
    """
    if asked and not importlib.util.find_spec("tensorflow"):
        raise UserError(
            "--tensorboard needs TensorFlow: pip install tensorflow, or leave "
            "it out"
        )


def boards(
    place: Path, asked: bool, measure: ValidationCider, images_dir: Path
) -> list[keras.callbacks.Callback]:
    """What logs for TensorBoard; Keras has TensorFlow do that.

    Args:
        place: the run folder.
        asked: whether that is worth importing TensorFlow on another backend.
        measure: captions the validation split.
        images_dir: where its photographs are.
    """
    if not (asked or TENSORFLOW):
        return []
    logs = place / "tensorboard"
    return [
        keras.callbacks.TensorBoard(logs),
        ShownCaptions(measure, images_dir, logs),
    ]


def history_table(history: list[dict[str, float]]) -> pd.DataFrame:
    """One row an epoch, with the columns that history.csv has."""
    columns = [
        "epoch",
        "loss",
        "token_accuracy",
        "val_loss",
        "val_token_accuracy",
        "val_cider",
        "reward",
        "learning_rate",
        "seconds",
    ]
    table = pd.DataFrame(history, columns=columns)
    return table.astype({"epoch": int})
