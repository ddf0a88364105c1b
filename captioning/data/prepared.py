"""What preprocess.py leaves for the other scripts: data/cache/<dataset>/."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from captioning.data import vocabulary
from captioning.data.datasets import Dataset
from captioning.data.vocabulary import Vocabulary
from captioning.features import cache as features
from captioning.files import write_csv, write_text
from config import SPLITS, Config, UserError, group

TABLE = ["image", "split", "caption", "tokens"]
# A photograph that lies in two splits under two names.
DUPLICATES = ["image", "split", "other_image", "other_split"]


class Split(NamedTuple):
    """The images of one split, in the order of the dataset."""

    images: list[str]
    image_ids: list[Any]  # COCO's numbers, or the names again
    captions: list[list[str]]  # as written, of each image
    tokens: list[list[list[str]]]  # the same, tokenised


def folder(config: Config) -> Path:
    """The cache folder of a dataset, as the data fields want it.

    Fields that are at their defaults leave the plain name, so that a quick
    try with other values never overwrites the real thing.
    """
    fields = {name: getattr(config, name) for name in group("data")}
    changed = {
        each.name: fields[each.name]
        for each in dataclasses.fields(Config)
        if each.name in fields
        and each.name != "dataset"
        and fields[each.name] != each.default
    }
    name = config.dataset
    if changed:
        text = json.dumps(changed, sort_keys=True)
        name += "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path(config.data_dir) / "cache" / name


def save(
    config: Config,
    dataset: Dataset,
    duplicates: Sequence[tuple[str, str]] = (),
) -> tuple[Vocabulary, int]:
    """Builds the vocabulary, and writes it and the captions.

    Args:
        config: its data fields.
        dataset: its table and what was skipped and repaired.
        duplicates: pairs of images with equal pixels in different splits.

    Returns:
        The vocabulary of the training split, and how many entries
        `repaired.csv` has.
    """
    table = dataset.table
    tokens = [text.split() for text in table["tokens"]]
    cut = [
        (image, f"caption of {len(words)} words is cut")
        for image, words in zip(table["image"], tokens, strict=True)
        if len(words) > config.max_caption_length
    ]
    training = [
        words
        for words, split in zip(tokens, table["split"], strict=True)
        if split == "train"
    ]
    words = vocabulary.build(training, config.min_word_count)
    repaired = [*dataset.repaired, *cut]
    place = folder(config)
    if (table["image_id"] == table["image"]).all():
        table = table.drop(columns="image_id")
    write_csv(place / "captions.csv", table)
    vocabulary.save(words, place / "vocabulary.json")
    columns = ["image", "reason"]
    write_csv(place / "skipped.csv", dataset.skipped, columns)
    write_csv(place / "repaired.csv", repaired, columns)
    splits = dict(zip(table["image"], table["split"], strict=True))
    pairs = [(a, splits[a], b, splits[b]) for a, b in duplicates]
    write_csv(place / "duplicates.csv", pairs, DUPLICATES)
    fields = {name: getattr(config, name) for name in group("data")}
    fields["images_dir"] = str(dataset.images_dir.resolve())
    write_text(place / "dataset.json", json.dumps(fields, indent=2) + "\n")
    return words, len(repaired)


def load_split(config: Config, split: str) -> Split:
    """Reads the captions of a split.

    Args:
        config: its data fields.
        split: train, val or test.

    Raises:
        UserError: if preprocess.py has not run with these data fields, or
            the dataset has no such split.
    """
    table = _read(config)
    table = table[table["split"] == split]
    if table.empty:
        found = splits(config)
        raise UserError(
            f"{folder(config)} has no split {split}, only "
            f"{' and '.join(found)}: give --split {found[-1]}, or add images "
            f"for {split} to the dataset"
        )
    if "image_id" in table:
        table = table.assign(image_id=table["image_id"].astype(int))
    else:
        table = table.assign(image_id=table["image"])
    grouped = table.groupby("image", sort=False)
    return Split(
        list(grouped.groups),
        grouped["image_id"].first().tolist(),
        grouped["caption"].agg(list).tolist(),
        # One string for all occurrences of a word: a third of the memory.
        [
            [list(map(sys.intern, text.split())) for text in each]
            for each in grouped["tokens"].agg(list)
        ],
    )


def splits(config: Config) -> list[str]:
    """The splits that a preprocessed dataset has."""
    table = _read(config)
    return [name for name in SPLITS if (table["split"] == name).any()]


def _read(config: Config) -> pd.DataFrame:
    """Reads captions.csv of the data fields, and of no others."""
    place = folder(config)
    _check_fields(config, place)
    path = place / "captions.csv"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return table[[*TABLE, *({"image_id"} & {*table.columns})]]
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read ({reason}): run preprocess.py again"
        ) from None


def images_dir(config: Config) -> Path:
    """Where the images were when they were preprocessed."""
    path = folder(config) / "dataset.json"
    return Path(json.loads(path.read_text(encoding="utf-8"))["images_dir"])


def load_vocabulary(config: Config) -> Vocabulary:
    """Reads the vocabulary of the training split."""
    return vocabulary.load(folder(config) / "vocabulary.json")


def load_features(
    config: Config, description: dict[str, Any], images: Iterable[str]
) -> tuple[features.Cache, np.ndarray]:
    """Opens the features of some images.

    Args:
        config: its data fields.
        description: from `features.describe`.
        images: their names.

    Returns:
        The cache and the row of each image, int (images,).

    Raises:
        UserError: if the features are not there or not complete.
    """
    cache = features.load(
        folder(config) / features.key(description), description
    )
    rows = np.array([cache.row.get(image, -1) for image in images])
    missing = int(np.sum((rows < 0) | (cache.finished[rows] == 0)))
    if missing:
        raise UserError(
            f"{cache.folder} lacks the features of {missing:,} images: run "
            "preprocess.py again with the same flags, it goes on where it "
            "stopped"
        )
    return cache, rows


def _check_fields(config: Config, place: Path) -> None:
    """Holds the data fields against those the cache was made with."""
    path = place / "dataset.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"there is no preprocessed dataset in {place}: run preprocess.py "
            "first, with the same flags"
        ) from None
    for name in group("data"):
        if found.get(name) != getattr(config, name):
            raise UserError(
                f"{path}: {name} is {found.get(name)!r}, not "
                f"{getattr(config, name)!r}: run preprocess.py again"
            )
