"""Reads the dataset layouts people have into one pandas table.

data/README.md shows each layout. A reader turns the caption files of its
layout into rows; what comes after is the same for all: clean the rows, find
the images, split.
"""

import codecs
import csv
import fnmatch
import hashlib
import html
import io
import itertools
import json
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from config import SPLIT_SYNONYMS, SPLITS, UserError

# Images lie at most three folders below the dataset folder, and a name in
# the captions may add some; a limit, because links may go round in circles.
_MAX_DEPTH = 5
# Where two folders hold the same names, these come first.
_IMAGE_FOLDERS = (
    "images",
    "flickr30k_images",
    "flickr30k-images",
    "flickr8k_dataset",
    "flicker8k_dataset",
)
_IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name")
_CAPTION_COLUMNS = ("caption", "comment", "raw")
# Files with one image name a line, by the end of their path.
_SPLIT_LISTS = (
    r"(?:^|/)Flickr_8k\.(train|dev|test)Images\.txt$",
    r"(?:^|/)karpathy_splits/(train|val|dev|test)\.txt$",
)
# Why an image is left out that the dataset itself leaves out: nothing is wrong
# with it.
UNSPLIT = ("no split that is known", "in no split list")
# Control characters, line and paragraph separators, surrogates, BOM.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]")


class Dataset(NamedTuple):
    """Captions and their images.

    Attributes:
        table: one row a caption, with the columns image (name below
            images_dir, with forward slashes), split (train, val or test),
            caption, and image_id (COCO's numbers, else the images' names);
            sorted by image, the captions of an image in the order of the file.
        images_dir: the folder that the image names are relative to.
        layout: one of config.LAYOUTS.
        summary: one line about what was found.
        skipped: (image, reason) for every image or caption left out.
        repaired: (image or file, reason) for whatever was changed.
    """

    table: pd.DataFrame
    images_dir: Path
    layout: str
    summary: str
    skipped: list[tuple[str, str]]
    repaired: list[tuple[str, str]]


class _Row(NamedTuple):
    """A caption as a reader found it."""

    image: str
    caption: str
    split: str = ""
    image_id: int | None = None


class _Notes(NamedTuple):
    """What is told about the dataset: pairs of a name and a reason."""

    skipped: list[tuple[str, str]]
    repaired: list[tuple[str, str]]


class _Found(NamedTuple):
    """Captions whose images were looked up."""

    paths: list[Path]
    rows: list[_Row]
    folder: str  # of the images, relative to the dataset folder
    notes: _Notes


# A folder's path relative to the dataset folder ("" is that itself) -> the
# names in it. Every folder is listed once; no image is looked up on the disk.
_Folders = dict[str, set[str]]


def find_dataset(
    directory: Path, layout: str, val_share: float, test_share: float
) -> Dataset:
    """Reads the captions in a folder and finds their images.

    Args:
        directory: the dataset folder.
        layout: one of config.LAYOUTS; "auto" takes the first that is there.
        val_share: share of the images for val where the dataset has no split.
        test_share: the same for test.

    Returns:
        The dataset. No image is in two splits, and every image has a file.

    Raises:
        UserError: if there is no folder, no captions or no image of them.
    """
    folders = _list_folders(directory)
    layout, candidates = _find_captions(directory, folders, layout)
    # Only one candidate as a rule; else the one that these images belong to.
    found = max(
        (_read(directory, folders, layout, paths) for paths in candidates),
        key=lambda found: len(found.rows),
    )
    rows, how = _split(found, directory, folders, val_share, test_share)
    if not rows:
        reasons = Counter(reason for _, reason in found.notes.skipped)
        reason, _ = reasons.most_common(1)[0]
        raise UserError(
            f"{found.paths[0]}: no image of it can be used (mostly: {reason}); "
            "see data/README.md for where the images go"
        )
    rows.sort(key=lambda row: row.image)
    table = pd.DataFrame(
        {
            "image": [row.image for row in rows],
            "split": [row.split for row in rows],
            "caption": [row.caption for row in rows],
            "image_id": _image_ids(rows),
        }
    )
    return Dataset(
        table,
        directory / found.folder,
        layout,
        _summary(table, layout, found.paths, how),
        list(dict.fromkeys(found.notes.skipped)),
        list(dict.fromkeys(found.notes.repaired)),
    )


def _image_ids(rows: list[_Row]) -> list[Any]:
    """COCO's numbers if every image has one of its own, else the names."""
    numbers = {row.image: row.image_id for row in rows}
    if None in numbers.values() or len({*numbers.values()}) < len(numbers):
        return [row.image for row in rows]
    return [numbers[row.image] for row in rows]


def equal_pixels_across_splits(
    digests: Mapping[str, str], table: pd.DataFrame
) -> list[tuple[str, str]]:
    """Finds photographs that lie in two splits under two names.

    Args:
        digests: image -> digest of its pixels.
        table: a dataset's table.

    Returns:
        Pairs of images with equal pixels in different splits, sorted; each
        image is paired with one other, however many equal it.
    """
    splits = dict(zip(table["image"], table["split"], strict=True))
    groups = defaultdict(list)
    for image in sorted(digests.keys() & splits.keys()):
        groups[digests[image]].append(image)
    pairs = set()
    for group in groups.values():
        first: dict[str, str] = {}  # split -> its first image
        for image in group:
            first.setdefault(splits[image], image)
        for image in group:
            others = [i for s, i in first.items() if s != splits[image]]
            pairs.update(tuple(sorted((image, i))) for i in others[:1])
    return sorted(pairs)


# --- where things are -----------------------------------------------------


def _list_folders(directory: Path) -> _Folders:
    if not directory.is_dir():
        raise UserError(
            f"no folder {directory}: put the dataset there, see "
            "data/README.md, or say where it is with --dataset-dir"
        )
    folders: _Folders = {}
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(directory / folder) as entries:
                below = _list_folder(entries, folders.setdefault(folder, set()))
        except OSError as error:
            if not folder:
                raise UserError(f"{directory}: {error.strerror}") from None
            continue  # its images will be missing
        if _depth(folder) < _MAX_DEPTH:
            pending += [_join(folder, name) for name in below]
    # The shallowest first, then by name.
    order = sorted(folders, key=lambda folder: (_depth(folder), folder))
    return {folder: folders[folder] for folder in order}


def _list_folder(entries: Iterable[os.DirEntry], names: set[str]) -> list[str]:
    """Adds the names in a folder to `names`; returns the folders in it."""
    below = []
    for entry in entries:
        # Archives made on a Mac carry a shadow "._name" of every file.
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        names.add(entry.name)
        try:
            if entry.is_dir():
                below.append(entry.name)
        except OSError:  # a link to itself
            continue
    return below


def _join(folder: str, name: str) -> str:
    return posixpath.join(folder, name).rstrip("/")


def _depth(path: str) -> int:
    return len(path.split("/")) if path else 0


def _find_captions(
    directory: Path, folders: _Folders, layout: str
) -> tuple[str, list[list[Path]]]:
    """The layout, and its caption files: each list is one dataset.

    What lies two folders deep counts only where nothing lies above it.
    """
    wanted = _LAYOUTS if layout == "auto" else {layout: _LAYOUTS[layout]}
    for deepest, name in itertools.product((1, 2), wanted):
        patterns, _ = wanted[name]
        paths = [
            _join(folder, file)
            for folder, files in folders.items()
            if _depth(folder) <= deepest
            for file in files
            if any(fnmatch.fnmatchcase(file, each) for each in patterns)
        ]
        # The shorter name first: Flickr8k.token.txt, not the
        # Flickr8k.lemma.token.txt that lies beside it.
        paths = [path for path in paths if path not in folders]
        paths.sort(key=lambda path: (_depth(path), len(path), path))
        if paths:
            datasets = defaultdict(list)
            for path in paths:
                datasets[_dataset_of(path, name)].append(directory / path)
            return name, list(datasets.values())
    expected = ", ".join(p for patterns, _ in wanted.values() for p in patterns)
    raise UserError(
        f"no captions found in {directory}: expected one of {expected}; see "
        "data/README.md"
    )


def _dataset_of(path: str, layout: str) -> str:
    """What files of one dataset share: of COCO the year, else the path."""
    if layout == "coco":
        return re.search(r"(\d*)\.json$", path).group(1)
    return path


def _find_images(images: Iterable[str], folders: _Folders) -> tuple[str, int]:
    """The folder that holds most of the images, and how many of them."""
    names: dict[str, set[str]] = defaultdict(set)
    for image in images:
        parent, name = posixpath.split(image)
        names[parent].add(name)
    best, most = "", (0, False)
    for folder in folders:
        count = sum(
            len(inside & folders.get(_join(folder, parent), set()))
            for parent, inside in names.items()
        )
        usual = posixpath.basename(folder).lower() in _IMAGE_FOLDERS
        if (count, usual) > most and count:
            best, most = folder, (count, usual)
    return best, most[0]


# --- from files to rows ---------------------------------------------------


def _read(
    directory: Path, folders: _Folders, layout: str, paths: list[Path]
) -> _Found:
    """Reads caption files, and keeps the rows that can be used."""
    notes = _Notes([], [])
    reader = _LAYOUTS[layout][1]
    rows = [row for path in paths for row in reader(path, notes)]
    if not rows:
        raise UserError(
            f"{paths[0]}: no captions in it are in the {layout} layout; see "
            "data/README.md, or choose another with --layout"
        )
    rows = _clean(rows, notes)
    folder, count = _find_images((row.image for row in rows), folders)
    if not count:
        # COCO's images may lie in one folder instead of train2014, val2014.
        flat = [row._replace(image=row.image.split("/")[-1]) for row in rows]
        folder, count = _find_images((row.image for row in flat), folders)
        rows = flat if count else rows
    there = {
        image
        for image in {row.image for row in rows}
        if _is_there(image, folder, folders)
    }
    notes.skipped.extend(
        (row.image, "missing") for row in rows if row.image not in there
    )
    rows = [row for row in rows if row.image in there]
    return _Found(paths, rows, folder, notes)


def _is_there(image: str, folder: str, folders: _Folders) -> bool:
    parent, name = posixpath.split(posixpath.join(folder, image))
    return name in folders.get(parent, ())


def _clean(rows: list[_Row], notes: _Notes) -> list[_Row]:
    """Rows with safe image names and captions of words; tells of the rest."""
    kept = []
    for row in rows:
        # JSON can hold surrogates, which no file can be written with.
        image = row.image.encode("utf-8", "replace").decode("utf-8").strip()
        reason = _unsafe(image)
        if reason:
            notes.skipped.append((image, reason))
            continue
        image = posixpath.normpath(image.replace("\\", "/"))
        caption = html.unescape(row.caption)
        if caption != row.caption:
            notes.repaired.append((image, "HTML in a caption"))
        if _CONTROL.search(caption):
            notes.repaired.append((image, "control characters in a caption"))
            caption = _CONTROL.sub(" ", caption)
        caption = caption.strip()
        if not caption or caption.lower() == "nan":
            notes.skipped.append((image, "caption is empty"))
        elif not any(map(str.isalnum, caption)):
            notes.skipped.append((image, "caption without a word"))
        else:
            kept.append(row._replace(image=image, caption=caption))
    return kept


def _unsafe(image: str) -> str:
    """Why an image of this name must not be opened; empty if it may.

    The rules of all platforms hold on each, so that a dataset means the same
    everywhere.
    """
    if not image:
        return "no image name"
    if "\0" in image:
        return "NUL in the image name"
    if image[0] in "/\\" or re.match("[A-Za-z]:", image):
        return "absolute path instead of an image name"
    if ".." in re.split(r"[/\\]", image):
        return "'..' in the image name"
    return ""


def _read_text(path: Path, notes: _Notes) -> str:
    """A file's text with lines that end in a newline only."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        data = data.replace(b"\0", b"")
        notes.repaired.append((path.name, "NUL bytes removed"))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="as-latin-1")
        notes.repaired.append((path.name, "not UTF-8: read as Latin-1"))
    text = text.replace("\r\n", "\n")
    # A lone carriage return ends a line only in files of old Macs.
    return text.replace("\r", " " if "\n" in text else "\n")


def _as_latin_1(error: UnicodeError) -> tuple[str, int]:
    """Decodes only the bytes that are not UTF-8 as Latin-1."""
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error("as-latin-1", _as_latin_1)


def _read_json(path: Path, notes: _Notes, key: str) -> dict[str, Any]:
    """A JSON object that has a list of images and one under `key`."""
    try:
        document = json.loads(_read_text(path, notes))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not JSON ({reason}); get it anew") from None
    for each in ("images", key):
        if not isinstance(document, dict) or not isinstance(
            document.get(each), list
        ):
            raise UserError(
                f"{path}: has no list {each!r}; see data/README.md, or choose "
                "another file with --layout"
            )
    return document


def _dicts(items: Any) -> list[dict[str, Any]]:
    """The objects in what should be a list of objects."""
    items = items if isinstance(items, list) else []
    return [item for item in items if isinstance(item, dict)]


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> int | None:
    whole = isinstance(value, int) and abs(value) < 2**63
    return int(value) if whole else None


# --- one reader a layout --------------------------------------------------


def _read_karpathy(path: Path, notes: _Notes) -> Iterator[_Row]:
    document = _read_json(path, notes, "images")
    for image in _dicts(document["images"]):
        name = posixpath.join(
            _string(image.get("filepath")), _string(image.get("filename"))
        )
        split = _string(image.get("split"))
        number = _number(image.get("cocoid"))
        for sentence in _dicts(image.get("sentences")):
            yield _Row(name, _string(sentence.get("raw")), split, number)


def _read_coco(path: Path, notes: _Notes) -> Iterator[_Row]:
    document = _read_json(path, notes, "annotations")
    # captions_train2017.json -> train2017, the folder of its images
    folder = path.stem.removeprefix("captions_")
    split = folder.rstrip("0123456789")
    split = split if _split_name(split) else ""
    # As text, because a list as a number would be no key.
    names = {
        str(image.get("id")): _string(image.get("file_name"))
        for image in _dicts(document["images"])
    }
    for annotation in _dicts(document["annotations"]):
        number = _number(annotation.get("image_id"))
        name = names.get(str(annotation.get("image_id")), "")
        if name and "/" not in name:
            name = f"{folder}/{name}"
        yield _Row(name, _string(annotation.get("caption")), split, number)


def _read_csv(path: Path, notes: _Notes) -> Iterator[_Row]:
    """Any CSV file whose first line names an image and a caption column."""
    text = _read_text(path, notes)
    first_line = text.partition("\n")[0]
    delimiter = max(",;\t|", key=first_line.count)
    options = {
        "delimiter": delimiter,
        "skipinitialspace": f"{delimiter} " in first_line,
    }
    records = _csv_records(text, options, path, notes)
    header = [field.strip().lower() for field in records[0]] if records else []
    columns = [
        next((header.index(name) for name in names if name in header), None)
        for names in (_IMAGE_COLUMNS, _CAPTION_COLUMNS, ("split",))
    ]
    image, caption, split = columns
    if image is None or caption is None:
        raise UserError(
            f"{path}: its first line names no columns image and caption; see "
            "data/README.md"
        )
    for record in records[1:]:
        while len(record) > len(header) and not record[-1].strip():
            record.pop()
        surplus = len(record) - len(header)
        if surplus > 0:
            whole = slice(caption, caption + surplus + 1)
            record[whole] = [delimiter.join(record[whole])]
            notes.repaired.append(
                (record[image], f"caption with {delimiter!r} but no quotes")
            )
        if len(record) > max(image, caption):
            in_split = split is not None and len(record) > split
            yield _Row(
                record[image],
                record[caption],
                record[split] if in_split else "",
            )
        elif any(record):
            notes.skipped.append((record[0][:80], "row without a caption"))


def _csv_records(
    text: str, options: dict[str, Any], path: Path, notes: _Notes
) -> list[list[str]]:
    """The records of a CSV file, whatever its quotes are."""
    try:
        return list(csv.reader(io.StringIO(text), strict=True, **options))
    except csv.Error:
        # A quote without its partner would swallow the rows that follow.
        reason = "quotes that do not match: read line by line"
        notes.repaired.append((path.name, reason))
    records = []
    for line in text.split("\n"):
        try:
            records += csv.reader([line], **options)
        except csv.Error:
            notes.skipped.append((line[:80], "row that is no CSV"))
    return records


def _read_huggingface(path: Path, notes: _Notes) -> Iterator[_Row]:
    for row in _read_csv(path, notes):
        try:
            captions = json.loads(row.caption)
        except (ValueError, RecursionError):
            captions = None
        if isinstance(captions, list):
            for caption in captions:
                yield row._replace(caption=_string(caption))
        else:
            notes.skipped.append((row.image, "captions are no JSON list"))


def _read_kaggle30k(path: Path, notes: _Notes) -> Iterator[_Row]:
    for number, line in enumerate(_read_text(path, notes).split("\n"), 1):
        if not line.strip() or line.startswith("image_name"):
            continue
        image, *rest = (part.strip() for part in line.split("|", 2))
        if len(rest) == 2:
            yield _Row(image, rest[1])
            continue
        # The file has a row "2199200615.jpg| 4   A dog runs ...".
        damaged = re.match(r"(\d+)\s+(.*)", rest[0]) if rest else None
        if damaged:
            reason = f"line {number} has no separator before the caption"
            notes.repaired.append((image, reason))
            yield _Row(image, damaged.group(2))
        else:
            notes.skipped.append((image[:80], "row without a caption"))


def _read_token(path: Path, notes: _Notes) -> Iterator[_Row]:
    for line in _read_text(path, notes).split("\n"):
        match = re.match(r"([^\t]+?)(?:#\d+)?\t(.*)", line)
        if match:
            yield _Row(*match.groups())
        elif line.strip():
            notes.skipped.append((line[:80], "row without a caption"))


# Layout -> (the names of its caption files, its reader). The order is the
# order of preference: first what has a split of its own.
_Reader = Callable[[Path, _Notes], Iterator[_Row]]
_LAYOUTS: dict[str, tuple[tuple[str, ...], _Reader]] = {
    "karpathy": (
        (
            "dataset_flickr30k.json",
            "dataset_flickr8k.json",
            "dataset_coco.json",
            "dataset.json",
        ),
        _read_karpathy,
    ),
    "huggingface": (("flickr_annotations_*.csv",), _read_huggingface),
    "coco": (("captions_*.json",), _read_coco),
    "plain": (("captions.csv",), _read_csv),
    "kaggle30k": (("results.csv",), _read_kaggle30k),
    "kaggle8k": (("captions.txt",), _read_csv),
    "token": (("*.token.txt", "*.token"), _read_token),
}


# --- splits ---------------------------------------------------------------


def _split_name(text: str) -> str:
    """train, val or test as this project writes it; empty if none of them."""
    text = text.strip().lower()
    # Karpathy's restval: COCO's validation images that he left for training.
    text = {"restval": "train", **SPLIT_SYNONYMS}.get(text, text)
    return text if text in SPLITS else ""


def _split(
    found: _Found,
    directory: Path,
    folders: _Folders,
    val_share: float,
    test_share: float,
) -> tuple[list[_Row], str]:
    """Gives every row its split.

    Returns:
        The rows that are in a split, and how they were split, in words.
    """
    rows, notes = found.rows, found.notes
    images = {row.image for row in rows}
    if any(row.split for row in rows):
        pairs = [(row.image, _split_name(row.split)) for row in rows]
        how, reason = "split as in the file", UNSPLIT[0]
    else:
        how, pairs = _read_lists(directory, folders, images, notes)
        reason = UNSPLIT[1]
    if how:
        splits = _one_split(pairs, images, notes)
    else:
        how = "split by a hash of the image names"
        splits = {i: _hash_split(i, val_share, test_share) for i in images}
    notes.skipped.extend(
        (row.image, reason) for row in rows if row.image not in splits
    )
    rows = [
        row._replace(split=splits[row.image])
        for row in rows
        if row.image in splits
    ]
    return rows, how


def _read_lists(
    directory: Path, folders: _Folders, images: set[str], notes: _Notes
) -> tuple[str, list[tuple[str, str]]]:
    """Reads the first kind of split lists that names any of the images.

    Returns:
        "split by <files>" and pairs (image, split); both empty without lists.
    """
    paths = [
        _join(folder, file)
        for folder, files in folders.items()
        if _depth(folder) <= 2
        for file in sorted(files)
        if file.endswith(".txt") and _join(folder, file) not in folders
    ]
    for pattern in _SPLIT_LISTS:
        how, pairs = "", []
        for path in paths:
            match = re.search(pattern, path)
            if match:
                lines = _read_text(directory / path, notes).split("\n")
                split = _split_name(match.group(1))
                pairs += [(line.strip(), split) for line in lines]
                files = path[: match.start(1)] + "*" + path[match.end(1) :]
                how = how or f"split by {files}"
        if any(image in images for image, _ in pairs):
            return how, pairs
    return "", []


def _one_split(
    pairs: list[tuple[str, str]], images: set[str], notes: _Notes
) -> dict[str, str]:
    """Image -> split. An image in two splits stays in the held-out one.

    Taking it from train keeps the scores comparable with those of others.
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


def _hash_split(image: str, val_share: float, test_share: float) -> str:
    """A split that depends on nothing but the name."""
    digest = hashlib.sha256(image.encode("utf-8")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


def _summary(
    table: pd.DataFrame, layout: str, paths: list[Path], how: str
) -> str:
    images = table.drop_duplicates("image")
    counts = images["split"].value_counts()
    splits = ", ".join(
        f"{split} {counts[split]:,}" if split in counts else f"no {split}"
        for split in SPLITS
    )
    files = " and ".join([str(paths[0]), *(path.name for path in paths[1:])])
    return (
        f"{layout} layout in {files}: {len(images):,} images, "
        f"{len(table):,} captions; {how}: {splits}"
    )
