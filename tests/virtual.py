"""Trains runs on three virtual devices of TensorFlow.

python -m tests.virtual FLAGS

`three` is not disturbed, `middle` is ended at its third batch and given again,
and `drawn` is `three` with an epoch of self-critical training.
"""

import shutil
import sys
from unittest import mock

from captioning import command


def main(flags: list[str]) -> None:
    """Trains in this folder; prints what was printed."""
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    device = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [device] * 3)
    # One strategy for all runs, as a process of each run has one: what a
    # second one exchanges gets the numbers of what the first one exchanged.
    strategy = tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(3)])
    with mock.patch.object(
        tf.distribute, "MirroredStrategy", return_value=strategy
    ):
        train_runs(flags)


def train_runs(flags: list[str]) -> None:
    """Trains the three runs."""
    from captioning.training import callbacks
    from tests.scripts import good, run

    save = callbacks.SavePoints.save

    def end_at_the_third_batch(points: callbacks.SavePoints) -> None:
        save(points)
        if points.batch == 3:
            raise KeyboardInterrupt

    def train(name: str, *more: str) -> None:
        words = [*flags, "--run-name", name, *more]
        print(good("train.py", *words, folder="."))

    train("three")
    with (
        mock.patch.object(callbacks, "SAVE_SECONDS", 0),
        mock.patch.object(callbacks.SavePoints, "save", end_at_the_third_batch),
    ):
        ended = run("train.py", *flags, "--run-name", "middle", folder=".")
    assert ended.returncode == 130, ended.stderr
    train("middle")
    shutil.copytree("checkpoints/three", "checkpoints/drawn")
    train("drawn", "--scst-epochs", "1")


if __name__ == "__main__":
    command.import_keras()
    main(sys.argv[1:])
