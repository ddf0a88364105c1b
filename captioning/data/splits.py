"""Train, val or test for each image: from its file, lists, folders, a hash."""

import hashlib
import itertools
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from captioning.data.caption_files import (
    IMAGE_COLUMNS,
    Notes,
    Row,
    read_text,
    split_name,
)
from config import SPLITS, UserError

# Why an image is left out by its dataset: nothing is wrong with it.
UNSPLIT = ("no known split", "in no split list")
# Lists that name fewer of the images, with a smaller share of their names, are
# those of another dataset.
_SAME_DATASET = 0.1
# train.txt, Flickr_8k.trainImages.txt, karpathy_val.csv, test_images.txt
_LIST = re.compile(
    r"(.*[._ -])?(train|training|val|valid|validation|dev|test|testing)"
    r"([._ -]?(?:ids?|images?|img_?names?|imgs?|files?|filenames?|list|names?"
    r"|set|splits?))?\d*\.(?:txt|csv|tsv|lst)",
    re.IGNORECASE,
)
# How the training_images.csv of a run begins, which may lie in the dataset too.
_OF_A_RUN = "name,pixels\n"
_ENDING = re.compile(
    r"\.(jpe?g|jfif|jp2|png|gif|webp|bmp|tiff?|avif|hei[cf])$", re.IGNORECASE
)
# What an image may be called in a list -> the images that would fit.
_Index = dict[str, set[str]]


def split_rows(
    rows: list[Row],
    directory: Path,
    files: Collection[str],
    shares: tuple[float, float],
    notes: Notes,
) -> tuple[list[Row], str]:
    """Gives every row its split.

    Args:
        rows: captions of images that are there.
        directory: the dataset folder.
        files: the paths in it that may be split lists.
        shares: of val and test, where the dataset has no split.
        notes: takes what is skipped, repaired and to be said.

    Returns:
        The rows that are in a split, and where the split is from, in words.
    """
    images = {row.image for row in rows}
    how, reason = "split as in the file", UNSPLIT[0]
    if any(row.split for row in rows):
        pairs = [(row.image, split_name(row.split)) for row in rows]
    else:
        # Lists name images that are missing too.
        missing = {i for i, why in notes.skipped if why.startswith("missing")}
        how, pairs = _read_lists(directory, files, images, missing, notes)
        reason = UNSPLIT[1]
    if how:
        splits = _one_split(pairs, images, notes)
    else:
        how, splits = _split_by_name(images, *shares)
    left_out = sorted(images - splits.keys())
    notes.skipped.extend((image, reason) for image in left_out)
    if left_out and splits:
        notes.messages.append(
            f"{len(left_out):,} of {len(images):,} images are left out "
            f"({reason}), such as {left_out[0]}."
        )
    kept = [row for row in rows if row.image in splits]
    return [row._replace(split=splits[row.image]) for row in kept], how


def _one_split(
    pairs: Iterable[tuple[str, str]], images: set[str], notes: Notes
) -> dict[str, str]:
    """Image -> split. An image in two splits stays in the held-out one.

    Removing it from train keeps the scores comparable with published ones.
    """
    splits: dict[str, str] = {}
    for image, split in pairs:
        if not split or image not in images:
            continue
        before = splits.setdefault(image, split)
        if before != split:
            first, last = sorted((before, split), key=SPLITS.index)
            splits[image] = last
            reason = f"in {first} and in {last}: kept in {last}"
            notes.repaired.append((image, reason))
    return splits


# --- without lists --------------------------------------------------------


def _split_by_name(
    images: set[str], val_share: float, test_share: float
) -> tuple[str, dict[str, str]]:
    """Splits by the folders train, val and test, else by a hash of the names.

    Where there are folders but none for val, it is taken from train.
    """
    splits = {}
    for image in images:
        folders = map(split_name, image.split("/")[:-1])
        splits[image] = next(filter(None, folders), "")
    found = {*splits.values()}
    if "" in found or "train" not in found or len(found) < 2:
        return "split by a hash of the image names", {
            image: _hash_split(image, val_share, test_share) for image in images
        }
    if "val" in found:
        return "split by folder", splits
    for image, split in splits.items():
        if split == "train":
            splits[image] = _hash_split(image, val_share, 0)
    return "split by folder, and val by a hash of the names in train", splits


def _hash_split(image: str, val_share: float, test_share: float) -> str:
    """A split that depends on nothing but the name."""
    name = unicodedata.normalize("NFC", image)
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


# --- lists ----------------------------------------------------------------


class _List(NamedTuple):
    """A file of image names."""

    path: str  # below the dataset folder
    split: str
    images: list[str]  # that it names
    unknown: list[str]  # names that are of no image


class _Group(NamedTuple):
    """Lists whose paths differ only in their split."""

    pattern: str  # of the paths, such as karpathy_splits/*.txt
    lists: list[_List]

    @property
    def images(self) -> set[str]:
        """The images that the lists name."""
        return {image for each in self.lists for image in each.images}

    @property
    def has_train(self) -> bool:
        """Whether one of the lists is that of the training split."""
        return any(each.split == "train" for each in self.lists)


def _read_lists(
    directory: Path,
    files: Collection[str],
    images: set[str],
    missing: set[str],
    notes: Notes,
) -> tuple[str, list[tuple[str, str]]]:
    """Reads the split lists that name the most images.

    Returns:
        "split by <lists>" and pairs (image, split); both empty without lists.

    Raises:
        UserError: if the lists are those of another dataset.
    """
    groups = _group_lists(directory, files, images | missing, notes)
    best = max(groups, key=lambda g: (len(g.images), g.has_train), default=None)
    if best and not _belongs(best, images):
        if best.has_train:
            raise UserError(_wrong_lists(directory, best, images))
        best = None  # without a list for train, they have such names by chance
    unused = [e.path for g in groups if g is not best for e in g.lists]
    if unused:
        notes.messages.append(f"Not used as split lists: {', '.join(unused)}.")
    if not best:
        unread = dict.fromkeys(filter(_is_json_list, files))
        if unread:
            notes.messages.append(
                f"Not used as split lists: {', '.join(unread)}; names are read "
                "only from .txt, .lst, .csv and .tsv."
            )
        return "", []
    for each in best.lists:
        if each.unknown:
            count = len(each.images) + len(each.unknown)
            notes.messages.append(
                f"{each.path}: {len(each.unknown):,} of {count:,} names match "
                f"no image, such as {each.unknown[0][:80]} (images are named "
                f"like {min(images)})."
            )
    pairs = [
        (image, each.split) for each in best.lists for image in each.images
    ]
    return f"split by {best.pattern}", pairs


def is_list(path: str) -> bool:
    """Whether a file has the name of a split list."""
    return bool(_LIST.fullmatch(posixpath.basename(path)))


def _is_json_list(path: str) -> bool:
    """Whether a JSON file is called as a list is."""
    stem, ending = posixpath.splitext(posixpath.basename(path))
    return ending.lower() == ".json" and is_list(f"{stem}.txt")


def _group_lists(
    directory: Path, files: Iterable[str], images: set[str], notes: Notes
) -> list[_Group]:
    groups: dict[str, _Group] = {}
    index: _Index = {}
    for path in files:
        folder, name = posixpath.split(path)
        match = _LIST.fullmatch(name)
        if not match or not (directory / path).is_file():
            continue
        # Only now: it takes more memory than the captions of a million images.
        index = index or _index(images)
        text = read_text(directory / path, notes)
        if text.startswith(_OF_A_RUN):
            continue
        names = _names(text, index)
        found = {name: _find(name, index) for name in names}
        known = [image for image in found.values() if image]
        unknown = [name for name, image in found.items() if not image]
        pattern = f"{name[: match.start(2)]}*{name[match.end(2) :]}"
        pattern = posixpath.join(folder, pattern)
        key = posixpath.join(folder, f"{match[1] or ''}*{match[3] or ''}")
        group = groups.setdefault(key.casefold(), _Group(pattern, []))
        group.lists.append(_List(path, split_name(match[2]), known, unknown))
    return list(groups.values())


def _belongs(group: _Group, images: set[str]) -> bool:
    """Whether lists are of this dataset, or of a part of it or a larger one."""
    total = sum(len(each.images) + len(each.unknown) for each in group.lists)
    named = len(group.images)
    return named > 0 and named >= _SAME_DATASET * min(total, len(images))


def _wrong_lists(directory: Path, group: _Group, images: set[str]) -> str:
    wrong = next((each for each in group.lists if each.unknown), group.lists[0])
    example = wrong.unknown[0][:80] if wrong.unknown else "no names"
    return (
        f"{directory / wrong.path}: the split lists name "
        f"{len(group.images):,} of the {len(images):,} images; this one lists "
        f"{example}, while images are named like {min(images)}: correct the "
        "lists, or remove them to split by a hash of the names"
    )


def _names(text: str, index: _Index) -> list[str]:
    """The names in a list: its lines, or of a table the column of names."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return []
    rows = [re.split(r"[,;\t|]", line) for line in lines]
    header = [field.strip(" \"'").lower() for field in rows[0]]
    named = next((header.index(n) for n in IMAGE_COLUMNS if n in header), None)
    if named is not None:
        return [row[named] for row in rows[1:] if len(row) > named]
    words = [line.split() for line in lines]
    columns = [
        tuple(lines),
        *itertools.zip_longest(*rows, fillvalue=""),
        *itertools.zip_longest(*words, fillvalue=""),
    ]

    def likeness(column: Sequence[str]) -> tuple[int, int]:
        # A column of row numbers may fit too, but not with endings.
        exact = sum(not index.keys().isdisjoint(_forms(n)[:2]) for n in column)
        return exact, sum(bool(_find(name, index)) for name in column)

    best = max(dict.fromkeys(columns), key=likeness)
    return [name for name in best if name.strip()]


def _index(images: set[str]) -> _Index:
    index: _Index = defaultdict(set)
    for image in images:
        for form in _forms(image):
            index[form].add(image)
    for image in images:
        index[_forms(image)[0]] = {image}
    return dict(index)


def _find(name: str, index: _Index) -> str:
    """The one image that a name fits; empty if none or several do."""
    for form in _forms(name):
        if len(index.get(form, ())) == 1:
            return next(iter(index[form]))
    return ""


def _forms(name: str) -> list[str]:
    """What is compared of a name, the exact forms first."""
    name = unicodedata.normalize("NFC", name.strip(" \t\"'"))
    name = re.sub(r"(?<=.)#\d+$", "", name.replace("\\", "/"))
    name = name.removeprefix("./")
    base = posixpath.basename(name)
    stem = _ENDING.sub("", base)
    return [name, base, stem, base.casefold(), stem.casefold()]
