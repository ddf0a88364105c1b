"""What happens between the batches of Model.fit: measuring and saving."""

import importlib.util
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd

from captioning import runs
from captioning.backend import TENSORFLOW, one_device
from captioning.files import write_csv
from captioning.scoring.figures import write_curves
from captioning.training.batches import CaptionBatches
from config import UserError

SAVE_SECONDS = 180  # between two saved points within an epoch


class Averaged(keras.callbacks.SwapEMAWeights):
    """Lends the averaged weights of the optimizer to whatever is measured."""

    def __enter__(self) -> None:
        """Puts the averaged weights in place."""
        self.on_test_begin()

    def __exit__(self, *_: Any) -> None:
        """Puts the trained weights back."""
        self.on_test_end()

    def _backend_swap_variables(self, optimizer: Any) -> None:
        """Exchanges arrays as they are, wherever they lie.

        Keras takes one of the two through NumPy, which is shared memory that
        a later step may write to, and one device of many.
        """
        for variable, average in zip(
            optimizer._trainable_variables,
            optimizer._model_variables_moving_average,
            strict=True,
        ):
            trained = variable.value
            variable.assign(average.value)
            average.assign(trained)


class MeasureCider(keras.callbacks.Callback):
    """Adds `val_cider`, of free-running captions, to an epoch's logs.

    Keeps the weights of the best epoch and stops when no better one comes.

    Args:
        measure: captions the validation split and scores it.
        averaged: what puts the averaged weights in place.
        place: the run folder.
        every: epochs between measurements.
        patience: measurements without a better one before the end.
        epochs: how many epochs there are; after the last one it measures too.
        writes: whether this process keeps the weights.
    """

    def __init__(
        self,
        measure: Callable[[], float],
        averaged: Any,
        place: Path,
        every: int,
        patience: int,
        epochs: int,
        writes: bool = True,
    ) -> None:
        super().__init__()
        self.writes = writes
        self.measure, self.averaged, self.place = measure, averaged, place
        self.every, self.patience, self.epochs = every, patience, epochs
        self.best, self.best_epoch, self.since_best = -1.0, 0, 0

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Measures, every few epochs and after the last one."""
        if (epoch + 1) % self.every == 0 or epoch + 1 == self.epochs:
            self.judge(epoch, logs)

    def judge(self, epoch: int, logs: dict[str, float]) -> None:
        """Measures, and keeps the weights if they are the best."""
        with self.averaged:
            logs["val_cider"] = self.measure()
            if logs["val_cider"] > self.best and self.writes:
                with one_device():  # the others do not take part
                    runs.save_weights(self.model, self.place)
        self.since_best += 1
        if logs["val_cider"] > self.best:
            self.best, self.best_epoch = logs["val_cider"], epoch + 1
            self.since_best = 0
        self.model.stop_training = self.since_best >= self.patience


class SavePoints(keras.callbacks.Callback):
    """Saves all that an exact resume needs, and the history.

    A run that is killed goes on from its last saved point and sees what it
    would have seen: weights, optimizer, random state, data order, position
    in the epoch and running means are all there.

    Args:
        place: the run folder.
        batches: the training batches.
        cider: holds the best score.
        writes: whether this process is the one that saves.
    """

    def __init__(
        self,
        place: Path,
        batches: CaptionBatches,
        cider: MeasureCider,
        writes: bool = True,
    ) -> None:
        super().__init__()
        self.writes = writes
        self.place, self.batches, self.cider = place, batches, cider
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

    def self_critical_epochs(self) -> int:
        """How many epochs of it are done."""
        return (
            self.epoch - self.cross_entropy_epochs if self.self_critical else 0
        )

    def variables(self) -> list[Any]:
        """All variables that a step changes, in one order."""
        model = self.model
        # Between the rounds of self-critical training nothing is running.
        inside = self.batch and not self.self_critical
        running = model.metrics_variables if inside else []
        return [*model.variables, *model.optimizer.variables, *running]

    def restore(self, model: keras.Model) -> None:
        """Takes up the run where its folder stands, if it has begun."""
        self.set_model(model)
        progress = runs.load_progress(self.place)
        if progress is None:
            return
        for name in ("best", "best_epoch", "since_best"):
            setattr(self.cider, name, progress[name])
        self.epoch, self.batch = progress["epoch"], progress["batch"]
        self.history, self.seconds = progress["history"], progress["seconds"]
        self.cross_entropy_epochs = progress.get("cross_entropy_epochs")
        self.rewards = progress.get("rewards", [])

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
        """Stops a run whose loss is no number; saves now and then."""
        self.batch += 1
        self.check(logs["loss"])
        if self.batch < len(self.batches.order):
            self.save_if_due()

    def check(self, loss: float) -> None:
        """Stops a run whose loss is no number."""
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
            write_curves(self.place / "curves.png", table)
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
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds + time.monotonic() - self.begun,
            "best": self.cider.best,
            "best_epoch": self.cider.best_epoch,
            "since_best": self.cider.since_best,
            "history": self.history,
            "cross_entropy_epochs": self.cross_entropy_epochs,
            "rewards": self.rewards,
        }
        with one_device():  # the others do not take part
            runs.save_state(self.place, self.variables(), progress)

    def catch_signals(self) -> None:
        """Lets Ctrl-C and SIGTERM end the run at its next safe point."""

        def interrupt(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("\nSaving, then ending; once more ends at once.", flush=True)

        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)


def boards(place: Path, asked: bool) -> list[keras.callbacks.Callback]:
    """What logs for TensorBoard; Keras has TensorFlow do that.

    Args:
        place: the run folder.
        asked: whether that is worth importing TensorFlow on another backend.

    Raises:
        UserError: if TensorFlow is not installed.
    """
    if not (asked or TENSORFLOW):
        return []
    if not importlib.util.find_spec("tensorflow"):
        raise UserError(
            "--tensorboard needs TensorFlow: pip install tensorflow, or leave "
            "it out"
        )
    return [keras.callbacks.TensorBoard(place / "tensorboard")]


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
