"""Captions -> splits and vocabulary; images -> feature cache.

    python preprocess.py
    python preprocess.py --dataset flickr30k
    python preprocess.py --dataset flickr30k --worker 0/4

Reads the dataset in data/<dataset>/ (the default one, `sample`, is drawn on
the spot), runs every image once through each frozen encoder, and leaves the
result in data/cache/<dataset>/. If it is killed, the same command resumes where
it stopped. Several workers (0/4, 1/4, 2/4 and 3/4) encode a part of the images
each, on one machine or on several that share the disk; the last one to finish
writes the rest.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from captioning import command
from config import (
    CHARACTERS,
    OPEN,
    SAMPLE,
    SPLITS,
    WORDS,
    Config,
    UserError,
    each_encoder,
    is_named_by_folder,
)

# Above this share of unknown words in a split, the user is warned.
MANY_UNKNOWN = 0.1
# And above this share of captions that are cut.
MANY_CUT = 0.1
# With fewer images held out, chance decides which of two models scores better.
FEW_HELD_OUT = 100


def read_worker(text: str) -> tuple[int, int]:
    """The number of a worker and how many there are, of `0/4`."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(
            f"expects WORKER/WORKERS, counted from 0, like 0/4, not {text!r}"
        )
    return int(number), int(of)


ACTIONS = [
    command.Action(
        "--worker",
        {
            "type": read_worker,
            "default": None,
            "metavar": "NUMBER/WORKERS",
            "help": "encode only this part of the images, from 0/4 to 3/4; "
            "the last worker to finish completes the cache",
        },
    )
]


def main(arguments: command.Arguments) -> None:
    """Preprocesses a dataset."""
    from captioning.data import prepared, unpack
    from captioning.features import workers
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
    check_skipped(config, dataset.table, dataset.skipped)
    dataset = limit(config, dataset)
    check_splits(config, dataset)
    config, dataset = tokenise(config, dataset)
    check_words(config, dataset.table)
    check_lengths(config, dataset.table)
    described = describe_features(config)
    place = prepared.folder(config)
    worker = arguments.actions.worker
    if worker and not encode_part(config, dataset, described, *worker):
        return
    folders = [prepared.features_folder(config, each) for each in described]
    with ExitStack() as held:
        for features in sorted(folders):
            held.enter_context(workers.alone(features))
        dataset, duplicates = encode_images(config, dataset, described)
        check_splits(config, dataset)
        with lock(place, wait=True):
            words, repaired = prepared.save(config, dataset, duplicates)
        for features in folders:
            workers.clear(features, place.name)
    report(dataset, repaired, words, len(duplicates))
    if not config.limit_images:
        warn_of_few(dataset.table)
    print(f"Wrote {place}. Next: {command.next_line('train.py', arguments)}")


def draw_sample(config: Config) -> None:
    """Draws the sample, if that is the dataset and it lies in data/."""
    if config.dataset == SAMPLE and not config.dataset_dir:
        from captioning.data import prepared
        from captioning.data.sample import write_sample

        write_sample(prepared.directory(config))


def without(table: Any, images: list[str]) -> Any:
    """The rows of a table but for those of some images."""
    return table[~table["image"].isin(images)].reset_index(drop=True)


def limit(config: Config, dataset: Any) -> Any:
    """Keeps the first `limit_images` images of each split."""
    if not config.limit_images:
        return dataset
    table = dataset.table
    first = table.drop_duplicates("image").groupby("split", sort=False)
    kept = first.head(config.limit_images)["image"]
    table = table[table["image"].isin(kept)].reset_index(drop=True)
    return dataset._replace(table=table)


def check_splits(config: Config, dataset: Any) -> None:
    """Training needs a train and a val split."""
    there = set(dataset.table["split"])
    for split in ("train", "val"):
        if split not in there:
            raise UserError(
                f"the dataset {config.dataset} has no usable image in the "
                f"split {split}: see data/README.md for how splits are made"
            )


def check_skipped(config: Config, table: Any, skipped: Any) -> None:
    """Stops where too many images are unusable.

    Images that the dataset has put in no split are not: nothing is wrong
    with them.

    Args:
        config: its `max_skipped_share`.
        table: of the images that can be used.
        skipped: pairs of an image and the reason.
    """
    from captioning.data.splits import UNSPLIT

    there = set(table["image"])
    lost = {i for i, reason in skipped if reason not in UNSPLIT}
    lost -= there
    share = len(lost) / max(len(lost) + len(there), 1)
    if share > config.max_skipped_share:
        image, reason = next(p for p in skipped if p[0] in lost)
        raise UserError(
            f"{len(lost):,} of {len(lost) + len(there):,} images are "
            f"unusable, the first of them {image} ({reason}): fix the "
            "dataset, or allow more with --max-skipped-share"
        )


def tokenise(config: Config, dataset: Any) -> tuple[Config, Any]:
    """Settles what a token is, and splits words into characters if these are.

    Args:
        config: its `tokeniser`.
        dataset: its captions as words.

    Returns:
        The config and the dataset as they are from here on.
    """
    from captioning.data import vocabulary

    if config.tokeniser == OPEN["tokeniser"]:
        captions = (text.split() for text in tokens_of(dataset.table, "train"))
        choice = WORDS
        if vocabulary.lacks_spaces(captions):
            choice = CHARACTERS
            print(
                "The captions have no spaces between words: each character is "
                "a token (--tokeniser words splits at spaces alone)."
            )
        config = dataclasses.replace(config, tokeniser=choice)
    if config.tokeniser == CHARACTERS:
        tokens = [
            " ".join(vocabulary.characters(text.split()))
            for text in dataset.table["tokens"]
        ]
        dataset = dataset._replace(table=dataset.table.assign(tokens=tokens))
    return config, dataset


def check_lengths(config: Config, table: Any) -> None:
    """Warns where many captions are longer than the longest that is kept."""
    lengths = table["tokens"].str.count(" ") + 1
    share = (lengths > config.max_caption_length).mean()
    if share > MANY_CUT:
        print(
            f"Warning: {share:.1%} of the captions are longer than "
            f"{config.max_caption_length} {config.tokeniser} and are cut "
            "there: raise --max-caption-length (nine in ten have at most "
            f"{lengths.quantile(0.9):.0f})"
        )


def check_words(config: Config, table: Any) -> None:
    """Looks at the vocabulary before hours go into the images.

    Args:
        config: its `min_word_count` and `tokeniser`, which is settled.
        table: the dataset's captions.

    Raises:
        UserError: if no word is frequent enough.
    """
    from captioning.data import vocabulary

    # Millions of captions, tokenised, would fill the memory.
    training = tokens_of(table, "train")
    words = vocabulary.build(map(str.split, training), config.min_word_count)
    is_empty = len(words) == len(vocabulary.SPECIAL_WORDS)
    shares = {
        split: share
        for split, share in unknown_shares(table, words).items()
        if share > MANY_UNKNOWN
    }
    if not is_empty and not shares:
        return
    remedy = f"lower --min-word-count (now {config.min_word_count})"
    if vocabulary.lacks_spaces(map(str.split, table["tokens"])):
        remedy = (
            "the captions have no spaces between words; give --tokeniser "
            "characters, insert them with a word segmenter for the language "
            f"(Chinese, Japanese, Thai, ...), or {remedy}"
        )
    word = config.tokeniser.removesuffix("s")
    if is_empty:
        raise UserError(
            f"no {word} occurs {config.min_word_count} times in the "
            f"{len(training):,} training captions, so the vocabulary would "
            f"be empty: {remedy}"
        )
    listed = ", ".join(f"{share:.1%} in {s}" for s, share in shares.items())
    print(
        f"Warning: many {word}s are outside the vocabulary ({listed}), and "
        f"no caption will ever contain them: {remedy}"
    )


def tokens_of(table: Any, split: str) -> Any:
    """The tokens of a split's captions, joined by spaces."""
    return table["tokens"][table["split"] == split]


def unknown_shares(table: Any, words: Any) -> dict[str, float]:
    """Split -> share of its words that are outside the vocabulary."""
    from captioning.data import vocabulary

    there = set(table["split"])
    return {
        split: vocabulary.unknown_share(
            (text.split() for text in tokens_of(table, split)), words
        )
        for split in SPLITS
        if split in there
    }


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
    """The encoders that a config joins, each for itself.

    Those that have no features yet are built at once: weights that cannot be
    loaded are told before the first image is encoded, and leave no folder
    behind.
    """
    import model
    from captioning.data import prepared

    found = []
    pairs = zip(each_encoder(config), described, strict=True)
    for (name, weights), description in pairs:
        alone = dataclasses.replace(
            config, encoder=name, encoder_weights=weights
        )
        build = functools.cache(functools.partial(model.build_encoder, alone))
        if not prepared.features_folder(config, description).exists():
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
    from captioning.features import workers

    def encode(encoder: OneEncoder) -> None:
        cache = open_cache(encoder, dataset)
        fill_cache(encoder, cache, dataset, (number, of))

    place = prepared.folder(config)
    for encoder in each_alone(config, described):
        # Whoever is the last with the last encoder is the last with all.
        others = workers.do_part(
            prepared.features_folder(config, encoder.description),
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
    from captioning.data import datasets
    from captioning.features import extraction

    encoders = each_alone(config, described)
    # All of them first: this reserves the disk that they need.
    caches = [open_cache(each, dataset) for each in encoders]
    for encoder, cache in zip(encoders, caches, strict=True):
        # Each gets the same pixels, and has the same to say of them.
        notes = fill_cache(encoder, cache, dataset)
    table = without(dataset.table, [image for image, _ in notes.skipped])
    skipped = dataset.skipped + notes.skipped
    # What the captions lost is a share of the whole dataset, not of the few
    # images of a limit.
    check_skipped(
        config, table, notes.skipped if config.limit_images else skipped
    )
    dataset = dataset._replace(
        skipped=skipped,
        repaired=dataset.repaired + notes.repaired,
        table=table,
    )
    digests = extraction.digests(cache, table["image"].unique())
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
    from captioning.data import prepared
    from captioning.features import cache

    versions = {
        "keras": keras.version(),
        "backend": keras.backend.backend(),
        "opencv": cv2.__version__,
        "precision": keras.config.dtype_policy().name,
    }
    return cache.create(
        prepared.features_folder(encoder.config, encoder.description),
        encoder.description,
        versions,
        dataset.images_dir,
        dataset.table["image"].drop_duplicates().tolist(),
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

    names = dataset.table["image"].drop_duplicates().tolist()
    notes = extraction.fill(
        cache,
        dataset.images_dir,
        extraction.share(names, *worker),
        encoder.config.input_size,
        start,
    )
    if notes.changed:
        print(
            f"{notes.changed:,} images changed after they had been encoded, "
            "and were encoded again"
        )
    return notes


def warn_of_few(table: Any) -> None:
    """Warns where a split has too few images to score anything on."""
    images = table.drop_duplicates("image")["split"].value_counts()
    few = [
        f"{images[split]:,} in {split}"
        for split in ("val", "test")
        if 0 < images.get(split, 0) < FEW_HELD_OUT
    ]
    if few:
        print(
            f"Warning: few images are held out ({', '.join(few)}). Scores on "
            f"fewer than {FEW_HELD_OUT} say little; if the dataset has no "
            "split of its own, raise --val-share and --test-share"
        )


def report(dataset: Any, repaired: int, words: Any, duplicates: int) -> None:
    """Prints what was made."""
    images = dataset.table.drop_duplicates("image")["split"].value_counts()
    captions = dataset.table["split"].value_counts()
    for split, share in unknown_shares(dataset.table, words).items():
        print(
            f"  {split:<6}{images[split]:>8,} images"
            f"{captions[split]:>10,} captions"
            f"{share:>8.1%} of {words.tokeniser} outside the vocabulary"
        )
    print(
        f"  vocabulary of {len(words):,} {words.tokeniser}; "
        f"{len(dataset.skipped):,} entries skipped, {repaired:,} repaired "
        "(skipped.csv, repaired.csv)"
    )
    if duplicates:
        print(
            f"  {duplicates:,} pairs of identical images are in different "
            "splits (duplicates.csv)"
        )


if __name__ == "__main__":
    command.run(main, __doc__, ACTIONS)
