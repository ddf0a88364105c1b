"""What preprocess.py leaves for the other scripts: data/cache/<dataset>/.

text-<8 hex>/       captions, vocabulary, what was skipped; one folder for
                    each combination of the data fields
features/<key>/     features; one folder for each encoder, shared by all
                    text folders
unpacked/           images and captions, if the dataset came in archives
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from captioning.data import vocabulary
from captioning.data.datasets import Dataset
from captioning.data.vocabulary import Vocabulary
from captioning.files import read_json, reading, write_csv, write_json
from config import (
    CHARACTERS,
    FIELDS,
    OPEN,
    SPLITS,
    WORDS,
    Config,
    UserError,
    group,
)

TABLE = ["image", "split", "caption", "tokens"]
# A photograph that lies in two splits under two names.
DUPLICATES = ["image", "split", "other_image", "other_split"]


class Split(NamedTuple):
    """The images of one split, in the order of the dataset."""

    images: list[str]
    image_ids: list[Any]  # COCO's numbers, or the names again
    captions: list[list[str]]  # as written, of each image
    tokens: list[list[list[str]]]  # the same, tokenised

    def first(self, images: int) -> "Split":
        """Its first images; all of them for 0."""
        return Split(*(column[: images or None] for column in tuple(self)))


class Captions(NamedTuple):
    """What a run is trained and judged on, but for the features."""

    train: Split
    val: Split
    words: Vocabulary


def directory(config: Config) -> Path:
    """Where a dataset is."""
    return Path(config.dataset_dir or Path(config.data_dir) / config.dataset)


def root(config: Config) -> Path:
    """The cache folder of a dataset."""
    return Path(config.data_dir) / "cache" / config.dataset


def unpacked(config: Config) -> Path:
    """Where the archives of a dataset are unpacked, if it is made of them."""
    return root(config) / "unpacked"


def folder(config: Config) -> Path:
    """The text folder of a dataset.

    It is named by a digest of the values of all data fields, so that neither
    a quick try nor an edited default overwrites anything.
    """
    text = json.dumps(_fields(config), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return root(config) / f"text-{digest}"


def settle_tokeniser(config: Config) -> Config:
    """Settles a tokeniser that is left open: as preprocess.py did last."""
    if config.tokeniser != OPEN["tokeniser"]:
        return config
    choices = [
        dataclasses.replace(config, tokeniser=name)
        for name in (WORDS, CHARACTERS)
    ]

    def when(choice: Config) -> int:
        path = folder(choice) / "dataset.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    return max(choices, key=when)


def _fields(config: Config) -> dict[str, Any]:
    """The data fields; 1 and 1.0 are one value."""
    kinds: dict[str, Any] = {n: FIELDS[n].type for n in group("data")}
    return {n: kind(getattr(config, n)) for n, kind in kinds.items()}


def check_source(config: Config, images_dir: Path) -> None:
    """Refuses a dataset where the cache is that of another of the same name.

    Args:
        config: with a dataset that is named by its folder.
        images_dir: where the images are.

    Raises:
        UserError: if the cached images are in another folder.
    """
    now, place = str(images_dir.resolve()), root(config)
    homes = directory(config).resolve(), unpacked(config).resolve()
    files = [*place.glob("text-*/dataset.json")]
    files += place.glob("features/*/meta.json")
    for path in sorted(files):
        was = Path(read_json(path).get("images_dir", now))
        if str(was) == now or any(map(was.is_relative_to, homes)):
            continue
        if was.is_dir():
            raise UserError(
                f"{place} is the cache of another dataset called "
                f"{config.dataset}, with images in {was}: give this one "
                "another name, with --dataset NAME together with --dataset-dir"
            )


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
    unit = config.tokeniser
    lengths = [len(text.split()) for text in table["tokens"]]
    cut = [
        (image, f"caption of {length} {unit} is cut")
        for image, length in zip(table["image"], lengths, strict=True)
        if length > config.max_caption_length
    ]
    training = map(str.split, table["tokens"][table["split"] == "train"])
    words = vocabulary.build(training, config.min_word_count, unit)
    repaired = [*dataset.repaired, *cut]
    place = folder(config)
    # Without it, the folder does not count until all of it is written.
    (place / "dataset.json").unlink(missing_ok=True)
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
    fields = _fields(config)
    fields["directory"] = str(directory(config).resolve())
    fields["images_dir"] = str(dataset.images_dir.resolve())
    write_json(place / "dataset.json", fields)
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


def load_captions(config: Config) -> Captions:
    """Reads the captions that a run is trained and judged on.

    Raises:
        UserError: as `load_split`.
    """
    train, val = (load_split(config, split) for split in ("train", "val"))
    words = vocabulary.load(folder(config) / "vocabulary.json")
    return Captions(train, val, words)


def splits(config: Config) -> list[str]:
    """The splits that a preprocessed dataset has."""
    table = _read(config)
    return [name for name in SPLITS if (table["split"] == name).any()]


def _read(config: Config) -> pd.DataFrame:
    """Reads captions.csv of the data fields, and of no others."""
    place = folder(config)
    _check_fields(config, place)
    path = place / "captions.csv"
    with reading(path, "run preprocess.py again"):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        ids = table["image"]
        if "image_id" in table:  # COCO's numbers
            ids = table["image_id"].astype(int)
        return table[TABLE].assign(image_id=ids)


def images_dir(config: Config) -> Path:
    """Where the images were when they were preprocessed; Path() if never."""
    found = read_json(folder(config) / "dataset.json")
    return Path(found.get("images_dir", ""))


def newest_images_dir(data_dir: str, dataset: str) -> Path | None:
    """Where a dataset's images were last, if that folder still exists."""
    notes = Path(data_dir, "cache", dataset).glob("text-*/dataset.json")
    for path in sorted(notes, key=os.path.getmtime, reverse=True):
        found = read_json(path).get("images_dir", "")
        if os.path.isdir(found):
            return Path(found)
    return None


def _check_fields(config: Config, place: Path) -> None:
    """Compares the data fields with those the text folder was made with."""
    path = place / "dataset.json"
    found = read_json(path)
    if not found:
        raise UserError(
            f"there is no preprocessed dataset in {place}: run preprocess.py "
            f"first, with the same flags{_other_tokeniser(config)}"
        )
    for name, wanted in _fields(config).items():
        if found.get(name) != wanted:
            raise UserError(
                f"{path}: {name} is {found.get(name)!r}, not {wanted!r}: run "
                "preprocess.py again"
            )
    if "directory" not in found or "images_dir" not in found:
        raise UserError(f"{path} is incomplete: run preprocess.py again")
    was, now = Path(found["directory"]), directory(config).resolve()
    if config.dataset_dir and was != now and was.is_dir():
        raise UserError(
            f"{place} was made from the dataset in {was}, not the one in "
            f"{now}: run preprocess.py first, with the same flags"
        )


def _other_tokeniser(config: Config) -> str:
    """What to add if the dataset was tokenised differently from the run."""
    other = WORDS if config.tokeniser == CHARACTERS else CHARACTERS
    if folder(dataclasses.replace(config, tokeniser=other)).exists():
        return f" and --tokeniser {config.tokeniser} (now it has {other})"
    return ""
