"""The epochs of cross-entropy: batches, and a `Model.fit` that resumes."""

import sys
from typing import Any

import keras

from captioning import job, runs
from captioning.backend import Devices, use_xla
from captioning.data.prepared import Captions
from captioning.data.vocabulary import encode
from captioning.features.joined import Features, channel_statistics
from captioning.training import objective
from captioning.training.batches import CaptionBatches
from captioning.training.callbacks import SavePoints
from config import Config


def make_batches(
    config: Config,
    features: tuple[Features, Features],
    captions: Captions,
    devices: Devices,
) -> tuple[CaptionBatches, CaptionBatches]:
    """Batches of the training and of the validation split.

    Args:
        config: its training fields.
        features: of both splits.
        captions: from `prepared.load_captions`.
        devices: that share each batch.
    """
    words, longest = captions.words, config.max_caption_length
    encoded = [
        [encode(each, words, longest) for each in split.tokens]
        for split in (captions.train, captions.val)
    ]
    train = CaptionBatches(
        features[0],
        encoded[0],
        config.batch_images,
        captions_per_image=config.captions_per_image,
        seed=config.seed,
        devices=devices,
    )
    val = CaptionBatches(
        features[1], encoded[1], config.batch_images, devices=devices
    )
    return train, val


def standardise(decoder: Any, features: Features) -> None:
    """Gives the decoder the statistics of the training features."""
    mean, deviation = channel_statistics(features)
    decoder.standardisation.mean.assign(mean)
    decoder.standardisation.deviation.assign(deviation)


def compile_decoder(
    decoder: keras.Model, config: Config, rate: Any, steps: int
) -> None:
    """Compiles a decoder for cross-entropy.

    Args:
        decoder: a `model.CaptioningModel`.
        config: its training fields.
        rate: the learning rate, a number or a schedule.
        steps: per epoch.
    """
    decoder.compile(
        objective.build_optimizer(config, rate, steps),
        objective.SmoothedCrossEntropy(config.label_smoothing),
        weighted_metrics=[objective.TokenAccuracy("token_accuracy")],
        jit_compile=use_xla(),
    )


def resume(decoder: Any, points: SavePoints, begun: bool) -> None:
    """Restores the variables of the last saved point, or saves the first one.

    So a run that has weights also has a state, whenever it is killed.

    Args:
        decoder: compiled.
        points: where training stands.
        begun: whether there is a saved point, from `SavePoints.restore`.
    """
    decoder.optimizer.build(decoder.trainable_variables)
    job.wait("restore")  # before the first process writes what others look for
    points.set_model(decoder)
    points.judge.set_model(decoder)
    if not begun:
        points.start(0)
        points.save()
        return
    if points.self_critical:
        return  # which has another optimizer
    if points.batch:
        # Keras creates its metrics when it first measures, and resets them
        # when an epoch begins: `SavePoints` restores them after that.
        decoder.test_on_batch(*points.batches[0])
    runs.load_state(points.place, points.variables())


def run_epochs(
    batches: CaptionBatches,
    val_batches: CaptionBatches,
    watching: list[keras.callbacks.Callback],
    points: SavePoints,
    epochs: int,
) -> None:
    """`Model.fit`; a begun epoch is finished by a `fit` of its own.

    Args:
        batches: of the training split.
        val_batches: of the validation split.
        watching: the callbacks.
        points: where training stands; one of the callbacks.
        epochs: to train in all.
    """
    ends = [points.epoch + 1, epochs] if points.batch else [epochs]
    for end in ends:
        if points.epoch >= end or points.judge.stopped:
            break
        batches.begin(points.epoch, points.batch)
        points.model.fit(
            batches,
            validation_data=val_batches,
            initial_epoch=points.epoch,
            epochs=end,
            callbacks=watching,
            # The batches have an order of their own; that of Keras could not
            # be resumed.
            shuffle=False,
            # A bar for a person, a line per epoch for a log.
            verbose=1 if sys.stdout.isatty() else 2,
        )
