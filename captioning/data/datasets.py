"""Reads the dataset layouts people have into one pandas table.

data/README.md shows each layout. `caption_files` turns the files of a layout
into rows; what comes after is the same for all: clean the rows, find the
images, split, tokenise.
"""

import fnmatch
import html
import itertools
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from captioning.data import caption_files, vocabulary
from captioning.data.caption_files import LAYOUTS, Notes, Row, split_name
from captioning.data.images import ENDINGS
from captioning.data.splits import split_rows
from config import SPLITS, UserError

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
# The endings of files that hold the captions of the image beside them.
SIDECARS = (".txt", ".json")
# Control characters, line and paragraph separators, surrogates, BOM.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]")


class Dataset(NamedTuple):
    """Captions and their images.

    Attributes:
        table: one row per caption, with the columns image (name below
            images_dir, with forward slashes), split (train, val or test),
            caption, tokens (joined by spaces), and image_id (COCO's numbers,
            else the images' names); sorted by image, the captions of an image
            in the order of the file.
        images_dir: the folder that the image names are relative to.
        layout: one of config.LAYOUTS.
        summary: one line about what was found.
        skipped: (image, reason) for every image or caption left out.
        repaired: (image or file, reason) for whatever was changed.
        messages: lines that the user should see.
    """

    table: pd.DataFrame
    images_dir: Path
    layout: str
    summary: str
    skipped: list[tuple[str, str]]
    repaired: list[tuple[str, str]]
    messages: Sequence[str] = ()

    @property
    def images(self) -> list[str]:
        """The images of the table, in its order."""
        return self.table["image"].drop_duplicates().tolist()


class NothingFound(UserError):
    """A folder without captions, or without the images that they name."""


class _Found(NamedTuple):
    """Captions whose images were looked up."""

    paths: list[str]  # of the caption files, or of their folder
    rows: list[Row]
    folder: str  # of the images, relative to the dataset folder
    notes: Notes


# The paths below the dataset folder -> those that are on the disk. Each is
# there as it is and in Unicode's normal form C: macOS writes names in form D.
_Files = dict[str, str]


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
        UserError: if the folder, its captions or all of their images are
            missing, or if its split lists are those of another dataset.
    """
    files = list_files(directory)
    try:
        layout, candidates = _find_captions(directory, files, layout)
        found = _read_best(directory, files, layout, candidates)
    except NothingFound:
        if layout not in ("auto", "sidecar"):
            raise
        found = _read_sidecars(directory, files)
        if not found.rows:
            raise
        layout = "sidecar"
    notes = found.notes
    # A name in form D is there twice.
    used = {*found.paths}
    others = [
        path for path in dict.fromkeys(files.values()) if path not in used
    ]
    shares = (val_share, test_share)
    rows, how = split_rows(found.rows, directory, others, shares, notes)
    if not rows:
        image, reason = notes.skipped[0]
        image = " ".join(image.split())  # a name may have line breaks in it
        raise NothingFound(
            f"{directory / found.paths[0]}: none of its images can be used; "
            f"the first is {image} ({reason}); see data/README.md for where "
            "the images go"
        )
    rows.sort(key=lambda row: row.image)
    table = pd.DataFrame(rows)[["image", "split", "caption"]]
    words = map(vocabulary.tokenise, table["caption"])
    table["tokens"] = [*map(" ".join, words)]
    table["image_id"] = _image_ids(rows)
    shown = found.paths[:1] if layout == "sidecar" else found.paths
    paths = [directory / path for path in shown]
    return Dataset(
        table,
        directory / found.folder,
        layout,
        _summary(table, layout, paths, how),
        list(dict.fromkeys(notes.skipped)),
        list(dict.fromkeys(notes.repaired)),
        list(dict.fromkeys(notes.messages)),
    )


def _image_ids(rows: list[Row]) -> list[Any]:
    """COCO's numbers if every image has one of its own, else the names."""
    numbers = {row.image: row.image_id for row in rows}
    if None in numbers.values() or len({*numbers.values()}) < len(numbers):
        return [row.image for row in rows]
    return [numbers[row.image] for row in rows]


def equal_pixels_across_splits(
    digests: Mapping[str, str], table: pd.DataFrame
) -> list[tuple[str, str]]:
    """Finds photographs that are in two splits under two names.

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
        home = splits[group[0]]
        away = [image for image in group if splits[image] != home]
        for image in group if away else ():
            other = away[0] if splits[image] == home else group[0]
            pairs.add((min(image, other), max(image, other)))
    return sorted(pairs)


# --- where things are -----------------------------------------------------


def list_files(directory: Path) -> _Files:
    """Lists every folder once; no image is looked up on the disk later.

    Args:
        directory: a dataset folder.

    Returns:
        Paths below it, the shallowest first -> those that are on the disk.

    Raises:
        UserError: if there is no such folder, or it cannot be read.
    """
    if not directory.is_dir():
        raise UserError(
            f"there is no folder {directory}: put the dataset there (see "
            "data/README.md), or say where it is with --dataset-dir"
        )

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == directory:
            raise UserError(f"{directory}: {error.strerror}")
        # The images of a folder below will be missing.

    paths: list[str] = []
    walk = os.walk(directory, onerror=unreadable, followlinks=True)
    for here, folders, names in walk:
        # Archives made on a Mac have a shadow "._name" of every file.
        folders[:] = [n for n in folders if n[0] != "." and n != "__MACOSX"]
        names = [n for n in names if n[0] != "."]
        below = Path(here).relative_to(directory)
        prefix = (below / "_").as_posix()[:-1]
        paths += [prefix + name for name in folders + names]
        if len(below.parts) == _MAX_DEPTH:
            folders.clear()
    # The shallowest first, then by name.
    paths.sort(key=lambda path: (path.count("/"), path))
    return {_nfc(path): path for path in paths} | {p: p for p in paths}


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _find_captions(
    directory: Path, files: _Files, layout: str
) -> tuple[str, list[list[str]]]:
    """The layout, and its caption files: each list is one dataset.

    What lies two folders deep counts only where nothing lies above it.
    """
    wanted = LAYOUTS if layout == "auto" else {layout: LAYOUTS[layout]}
    for deepest, name in itertools.product((1, 2), wanted):
        patterns, _ = wanted[name]
        paths = [
            path
            for path in dict.fromkeys(files.values())
            if path.count("/") <= deepest
            and _matches(posixpath.basename(path).lower(), patterns)
            and not (directory / path).is_dir()
        ]
        # The shorter name first: Flickr8k.token.txt, not the
        # Flickr8k.lemma.token.txt that lies beside it.
        paths.sort(key=lambda path: (path.count("/"), len(path), path))
        datasets = defaultdict(list)
        for path in paths:
            datasets[_dataset_of(path, name)].append(path)
        if datasets:
            return name, list(datasets.values())
    expected = ", ".join(p for patterns, _ in wanted.values() for p in patterns)
    raise NothingFound(
        f"no captions found in {directory}: expected "
        f"{f'one of {expected}, or ' * bool(expected)}NAME.txt beside "
        "NAME.jpg; see data/README.md"
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return name not in caption_files.NO_CAPTIONS and any(
        fnmatch.fnmatchcase(name, pattern) for pattern in patterns
    )


def is_caption_file(path: str) -> bool:
    """Whether a file has the name of a caption file of any layout."""
    name = posixpath.basename(path).lower()
    return any(_matches(name, patterns) for patterns, _ in LAYOUTS.values())


def _dataset_of(path: str, layout: str) -> tuple[str, ...]:
    """What the files of one dataset share.

    Of COCO the year; of files in folders called train, val and test the
    folder above; else the path.
    """
    if layout == "coco":
        return (re.search(r"(\d*)\.json$", path.lower())[1],)  # type: ignore
    folder, name = posixpath.split(path)
    if split_name(posixpath.basename(folder)):
        return (posixpath.dirname(folder), posixpath.splitext(name)[0])
    return (path,)


# --- from files to rows ---------------------------------------------------


def _read_best(
    directory: Path, files: _Files, layout: str, candidates: list[list[str]]
) -> _Found:
    """Reads the dataset that these images belong to; one only, as a rule."""
    found, errors = [], []
    for paths in candidates:
        try:
            found.append(_read(directory, files, layout, paths))
        except UserError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    best = max(found, key=lambda each: len(each.rows))
    unused = [p for p in itertools.chain(*candidates) if p not in best.paths]
    if unused:
        best.notes.messages.append(f"Captions not used: {', '.join(unused)}.")
    return best


def _read(
    directory: Path, files: _Files, layout: str, paths: list[str]
) -> _Found:
    """Reads caption files, and keeps the rows that can be used."""
    notes = Notes([], [], [])
    parts = caption_files.read([directory / p for p in paths], layout, notes)
    folders, found = [], []
    for path, part in zip(paths, parts, strict=True):
        rows = _clean(part, notes)
        near = posixpath.dirname(path)
        split = split_name(posixpath.basename(near))
        if split and len(paths) > 1:
            rows = [row._replace(split=row.split or split) for row in rows]
        folder, rows = _find_images(rows, files, near if split else "")
        folders.append(folder)
        found += _look_up(rows, folder, files, notes)
    folder = posixpath.commonpath(folders) if folders[1:] else folders[0]
    return _Found(paths, _below(folder, found), folder, notes)


def _below(folder: str, rows: list[Row]) -> list[Row]:
    """Rows whose images are named from a folder on, which may be empty."""
    if not folder:
        return rows
    start = len(folder) + 1
    return [row._replace(image=row.image[start:]) for row in rows]


def _read_sidecars(directory: Path, files: _Files) -> _Found:
    """Reads the captions beside the images: a.txt or a.json of a.jpg."""
    notes = Notes([], [], [])
    there = dict.fromkeys(files.values())
    records, taken = [], []
    for image in there:
        stem, ending = posixpath.splitext(image)
        names = [stem + each for each in SIDECARS if stem + each in there]
        if names and ending.lower() in ENDINGS:
            taken += names
            text = caption_files.read_text(directory / names[0], notes)
            record = caption_files.read_sidecar(image, text)
            if record:
                records.append(record)
            else:
                reason = f"no caption in {posixpath.basename(names[0])}"
                # The name of a file may hold bytes that are not UTF-8.
                told = caption_files.as_text(image)
                notes.skipped.append((told, caption_files.as_text(reason)))
    rows = _clean([*caption_files.read_records(records, notes)], notes)
    folders = {posixpath.dirname(row.image) for row in rows} or {""}
    folder = posixpath.commonpath(folders)
    rows = _below(folder, rows)
    return _Found([folder or ".", *taken], rows, folder, notes)


def _find_images(
    rows: list[Row], files: _Files, near: str
) -> tuple[str, list[Row]]:
    """The folder of the images, and the rows with the names they have there.

    It is looked for in the folder `near` first, which may be empty.
    """
    # Images may lie in one folder where the captions name two (COCO's
    # train2014 and val2014), or one that was called otherwise.
    flat = [
        row._replace(image=row.image.split("/")[-1])
        if "/" in row.image
        else row
        for row in rows
    ]
    parts = dict.fromkeys((near, ""))
    for part, names in itertools.product(parts, (rows, flat)):
        folder = _folder_of({_nfc(row.image) for row in names}, files, part)
        if folder is not None:
            return folder, names
    return near, rows


def _folder_of(names: set[str], files: _Files, near: str) -> str | None:
    """The folder that holds most of the names, if any does."""
    depths = {name.count("/") + 1 for name in names}
    counts: Counter[str] = Counter()
    for path, there in files.items():
        parts = path.split("/")
        if near and not path.startswith(f"{near}/"):
            continue
        for depth in depths:
            if depth <= len(parts) and "/".join(parts[-depth:]) in names:
                counts["/".join(there.split("/")[:-depth])] += 1

    def likeness(folder: str) -> tuple[int, bool]:
        name = posixpath.basename(folder).lower()
        return counts[folder], name in _IMAGE_FOLDERS

    # Of equals the shallowest.
    return max(counts, key=likeness, default=None)


def _look_up(
    rows: list[Row], folder: str, files: _Files, notes: Notes
) -> list[Row]:
    """Rows with the paths of their images, for those that are there."""
    found, missing = [], {}
    for row in rows:
        path = posixpath.join(folder, row.image)
        there = files.get(path) or files.get(_nfc(path))
        if there:
            found.append(row._replace(image=there))
        else:
            missing[row.image] = "missing"
    alike: dict[str, str] = {}  # names in lower case, also without ending
    for path, there in files.items() if missing else ():
        name = posixpath.basename(path).casefold()
        alike[name] = there
        alike.setdefault(posixpath.splitext(name)[0], there)
    for image in missing:
        asked = _nfc(posixpath.basename(image))
        if there := alike.get(asked.casefold(), ""):
            name = posixpath.basename(there)
            if _nfc(name) == asked:
                missing[image] += f", but there is {there}"
            else:
                missing[image] += f", but there is {name}"
                if posixpath.splitext(image)[1]:
                    missing[image] += "; names are case-sensitive"
    notes.skipped.extend(missing.items())
    return found


def _clean(rows: list[Row], notes: Notes) -> list[Row]:
    """Rows with safe image names and captions of words; notes the rest."""
    kept = []
    for row in rows:
        image = row.image.strip()
        reason = unsafe(image)
        if reason:
            notes.skipped.append((image, reason))
            continue
        # Flickr's files number the captions: 1000268201_693b08cb0e.jpg#0
        image = re.sub(r"(?<=.)#\d+$", "", image.replace("\\", "/"))
        image = posixpath.normpath(image)
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


def unsafe(image: str) -> str:
    """Says why a file of this name must not be opened.

    The rules of all platforms apply on each: a dataset is the same everywhere.

    Args:
        image: the name, relative to a folder.

    Returns:
        The reason; empty if the file may be opened.
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
