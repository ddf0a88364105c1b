"""Captions -> splits and vocabulary; images -> feature cache.

    python preprocess.py
    python preprocess.py --dataset flickr30k
    python preprocess.py --dataset flickr30k --worker 0/4

Reads the dataset in data/<dataset>/ (the default one, `sample`, is drawn on
the spot), runs every image once through each frozen encoder, and leaves the
result in data/cache/<dataset>/. If it is killed, the same command resumes where
it stopped. Several workers (0/4, 1/4, 2/4 and 3/4) each encode a part of the
images, on one machine or on several that share the disk; the last one to finish
writes the rest.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from captioning import command
from config import SAMPLE, Config, each_encoder, is_named_by_folder


def read_worker(text: str) -> tuple[int, int]:
    """The number of a worker and how many there are, of `0/4`."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(
            f"expects WORKER/WORKERS, counted from 0, like 0/4, not {text!r}"
        )
    return int(number), int(of)


ACTIONS: command.Actions = {
    "--worker": {
        "type": read_worker,
        "metavar": "NUMBER/WORKERS",
        "help": "encode only this part of the images, from 0/4 to 3/4; "
        "the last worker to finish completes the cache",
    },
}


def main(arguments: command.Arguments) -> None:
    """Preprocesses a dataset."""
    from captioning.data import checks, prepared, unpack
    from captioning.features import store, workers
    from captioning.files import lock

    config = arguments.config
    draw_sample(config)
    dataset = unpack.find_dataset(
        prepared.directory(config),
        prepared.unpacked(config),
        config.layout,
        (config.val_share, config.test_share),
    )
    print(dataset.summary)
    for message in dataset.messages:
        print(message)
    if is_named_by_folder(config, arguments.given):
        prepared.check_source(config, dataset.images_dir)
    checks.check_skipped(config, dataset.table, dataset.skipped)
    dataset = checks.limit(config, dataset)
    checks.check_splits(config, dataset)
    config, dataset = checks.tokenise(config, dataset)
    checks.check_words(config, dataset.table)
    checks.check_lengths(config, dataset.table)
    described = describe_features(config)
    place = prepared.folder(config)
    worker = arguments.actions.worker
    if worker and not encode_part(config, dataset, described, *worker):
        return
    folders = [store.folder(config, each) for each in described]
    with ExitStack() as held:
        for features in sorted(folders):
            held.enter_context(workers.alone(features))
        dataset, duplicates = encode_images(config, dataset, described)
        checks.check_splits(config, dataset)
        with lock(place, wait=True):
            words, repaired = prepared.save(config, dataset, duplicates)
        for features in folders:
            workers.clear(features, place.name)
    checks.report(dataset, repaired, words, len(duplicates))
    if not config.limit_images:
        checks.warn_of_few(dataset.table)
    print(f"Wrote {place}. Next: {command.next_line('train.py', arguments)}")


def draw_sample(config: Config) -> None:
    """Draws the sample, if that is the dataset and it lies in data/."""
    if config.dataset == SAMPLE and not config.dataset_dir:
        from captioning.data import prepared
        from captioning.data.sample import write_sample

        write_sample(prepared.directory(config))


def describe_features(config: Config) -> list[dict[str, Any]]:
    """What the features of each encoder depend on; imports Keras."""
    command.import_keras()
    from captioning import backend
    from captioning.features import encoder_weights

    backend.set_precision(config)
    return encoder_weights.describe_features(config)


class OneEncoder(NamedTuple):
    """One of the encoders that a config joins."""

    config: Config  # with this encoder alone
    description: dict[str, Any]  # of its features
    build: Callable[[], Any]  # the model, built once


def each_alone(
    config: Config, described: list[dict[str, Any]]
) -> list[OneEncoder]:
    """The encoders that a config joins, each on its own.

    Those that have no features yet are built at once: weights that cannot be
    loaded are reported before the first image is encoded, and leave no folder
    behind.
    """
    import model
    from captioning.features import store

    found = []
    pairs = zip(each_encoder(config), described, strict=True)
    for (name, weights), description in pairs:
        alone = dataclasses.replace(
            config, encoder=name, encoder_weights=weights
        )
        build = functools.cache(functools.partial(model.build_encoder, alone))
        if not store.folder(config, description).exists():
            build()
        found.append(OneEncoder(alone, description, build))
    return found


def encode_part(
    config: Config,
    dataset: Any,
    described: list[dict[str, Any]],
    number: int,
    of: int,
) -> bool:
    """Does the part of one worker.

    What it skips is read again, and reported, by the one that completes the
    cache.

    Args:
        config: its data and encoder fields.
        dataset: the whole of it.
        described: the features of each encoder.
        number: of this worker, from 0.
        of: how many workers there are.

    Returns:
        Whether it was the last, and has to complete the cache.
    """
    from captioning.data import prepared
    from captioning.features import store, workers

    def encode(encoder: OneEncoder) -> None:
        cache = open_cache(encoder, dataset)
        fill_cache(encoder, cache, dataset, (number, of))

    place = prepared.folder(config)
    for encoder in each_alone(config, described):
        # Whoever is the last with the last encoder is the last with all.
        others = workers.do_part(
            store.folder(config, encoder.description),
            place.name,
            number,
            of,
            functools.partial(encode, encoder),
        )
    if others:
        print(
            f"Worker {number}/{of} has done its part. Unfinished: "
            f"{', '.join(f'{n}/{of}' for n in others)}. The last one completes "
            f"{place}; restart a worker that was stopped, and it resumes."
        )
    return not others


def encode_images(
    config: Config, dataset: Any, described: list[dict[str, Any]]
) -> tuple[Any, Any]:
    """Encodes all images that the cache of an encoder lacks.

    Returns:
        The dataset without the images that cannot be used, and with what was
        skipped and repaired; pairs of images with equal pixels in different
        splits.

    Raises:
        UserError: if too many images cannot be used.
    """
    from captioning.data import checks, datasets
    from captioning.features import extraction

    encoders = each_alone(config, described)
    # All of them first: this reserves the disk that they need.
    caches = [open_cache(each, dataset) for each in encoders]
    for encoder, cache in zip(encoders, caches, strict=True):
        # All get the same pixels, so the notes are the same for each.
        notes = fill_cache(encoder, cache, dataset)
    lost = dataset.table["image"].isin([image for image, _ in notes.skipped])
    table = dataset.table[~lost].reset_index(drop=True)
    skipped = dataset.skipped + notes.skipped
    # With a limit, images that the captions lost do not count: they are a share
    # of the whole dataset.
    checks.check_skipped(
        config, table, notes.skipped if config.limit_images else skipped
    )
    dataset = dataset._replace(
        skipped=skipped,
        repaired=dataset.repaired + notes.repaired,
        table=table,
    )
    digests = extraction.digests(cache, dataset.images)
    duplicates = datasets.equal_pixels_across_splits(digests, table)
    return dataset, duplicates


def open_cache(encoder: OneEncoder, dataset: Any) -> Any:
    """Opens the cache of one encoder, with room for all images.

    Args:
        encoder: one of `each_alone`.
        dataset: the whole of it.

    Raises:
        UserError: if the disk is too small.
    """
    import cv2
    import keras

    import model
    from captioning.features import cache, store

    versions = {
        "keras": keras.version(),
        "backend": keras.backend.backend(),
        "opencv": cv2.__version__,
        "precision": keras.config.dtype_policy().name,
    }
    return cache.create(
        store.folder(encoder.config, encoder.description),
        encoder.description,
        versions,
        dataset.images_dir,
        dataset.images,
        model.feature_shape(encoder.config),
    )


def fill_cache(
    encoder: OneEncoder,
    cache: Any,
    dataset: Any,
    worker: tuple[int, int] = (0, 1),
) -> Any:
    """Fills the cache of one encoder, or the part of one worker.

    Args:
        encoder: one of `each_alone`.
        cache: from `open_cache`.
        dataset: the whole of it.
        worker: the number of the worker, and how many there are.

    Returns:
        What was skipped and repaired.
    """
    import keras

    from captioning.features import extraction

    @functools.cache
    def start() -> Any:
        print(
            f"Encoding with {encoder.config.encoder} "
            f"({encoder.config.encoder_weights} weights, "
            f"{keras.config.dtype_policy().name})"
        )
        return encoder.build().predict_on_batch

    notes = extraction.fill(
        cache,
        dataset.images_dir,
        extraction.share(dataset.images, *worker),
        encoder.config.input_size,
        start,
    )
    if notes.gone:
        print(
            f"{notes.gone:,} images cannot be found now: the features that "
            "they already have are kept"
        )
    if notes.changed:
        print(
            f"{notes.changed:,} images changed after they had been encoded: "
            "those that can be read were encoded again"
        )
    return notes


if __name__ == "__main__":
    command.run(main, __doc__, ACTIONS)
