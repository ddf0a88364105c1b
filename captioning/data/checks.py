"""What preprocess.py asks of captions before hours go into the images.

Each check raises a `UserError`, or prints a warning with its remedy.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from captioning.data import vocabulary
from captioning.data.datasets import Dataset
from captioning.data.splits import UNSPLIT
from captioning.data.vocabulary import Vocabulary
from config import CHARACTERS, OPEN, SPLITS, WORDS, Config, UserError

# Above this share of unknown words in a split, the user is warned.
MANY_UNKNOWN = 0.1
# And above this share of captions that are cut.
MANY_CUT = 0.1
# With fewer images held out, chance decides which of two models scores better.
FEW_HELD_OUT = 100


def limit(config: Config, dataset: Dataset) -> Dataset:
    """Keeps the first `limit_images` images of each split."""
    if not config.limit_images:
        return dataset
    table = dataset.table
    first = table.drop_duplicates("image").groupby("split", sort=False)
    kept = first.head(config.limit_images)["image"]
    table = table[table["image"].isin(kept)].reset_index(drop=True)
    return dataset._replace(table=table)


def check_splits(config: Config, dataset: Dataset) -> None:
    """Training needs a train and a val split."""
    there = set(dataset.table["split"])
    for split in ("train", "val"):
        if split not in there:
            raise UserError(
                f"the dataset {config.dataset} has no usable image in the "
                f"split {split}: see data/README.md for how splits are made"
            )


def check_skipped(
    config: Config, table: pd.DataFrame, skipped: Sequence[tuple[str, str]]
) -> None:
    """Stops where too many images are unusable.

    Images that the dataset has put in no split are not: nothing is wrong
    with them.

    Args:
        config: its `max_skipped_share`.
        table: of the images that can be used.
        skipped: pairs of an image and the reason.
    """
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


def tokenise(config: Config, dataset: Dataset) -> tuple[Config, Dataset]:
    """Settles what a token is, and splits words into characters if these are.

    Args:
        config: its `tokeniser`.
        dataset: its captions as words.

    Returns:
        The config and the dataset as they are from here on.
    """
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


def check_lengths(config: Config, table: pd.DataFrame) -> None:
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


def check_words(config: Config, table: pd.DataFrame) -> None:
    """Looks at the vocabulary before hours go into the images.

    Args:
        config: its `min_word_count` and `tokeniser`, which is settled.
        table: the dataset's captions.

    Raises:
        UserError: if no word is frequent enough.
    """
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


def tokens_of(table: pd.DataFrame, split: str) -> pd.Series:
    """The tokens of a split's captions, joined by spaces."""
    return table["tokens"][table["split"] == split]


def unknown_shares(table: pd.DataFrame, words: Vocabulary) -> dict[str, float]:
    """Split -> share of its words that are outside the vocabulary."""
    shares = {}
    for split in SPLITS:
        texts = map(str.split, tokens_of(table, split))
        counts = Counter(itertools.chain.from_iterable(texts))
        if counts:
            known = sum(counts[word] for word in words.words)
            shares[split] = 1 - known / counts.total()
    return shares


def warn_of_few(table: pd.DataFrame) -> None:
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


def report(
    dataset: Dataset, repaired: int, words: Vocabulary, duplicates: int
) -> None:
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
