"""Datasets as people download them -> a folder that `datasets` reads.

Tables of Parquet and Arrow hold the images themselves; zips and tars, those
of WebDataset among them, hold the files. Each is unpacked once, into the
cache, and noted there: the same command continues where it was stopped.
"""

import contextlib
import fnmatch
import functools
import hashlib
import itertools
import os
import posixpath
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from captioning.data import caption_files, datasets, splits
from captioning.data.caption_files import IMAGE_COLUMNS, Notes, Row
from captioning.data.images import ENDINGS
from captioning.files import (
    check_disk,
    lock,
    read_json,
    reading,
    write_csv,
    write_json,
)
from config import UserError

# Of these kinds the first that is there is unpacked: a hub often has the same
# images in two.
_KINDS = {
    "Parquet": (".parquet",),
    "Arrow": (".arrow",),
    "archive": (".zip", ".tar", ".tar.gz", ".tgz"),
}
# Captions and split lists that lie beside them.
_TEXTS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".token", ".lst")
_NOT_UNDERSTOOD = (".7z", ".rar", ".gz", ".bz2", ".xz", ".tfrecord")
# Photographs hardly shrink: what grows like this was made to fill a disk.
MAX_RATIO = 200
MAX_BYTES = 10**9  # up to here any ratio will do; no member may have more
_MAX_SIDECAR = 10**6
_BATCH = 64  # rows of a table in memory at a time
DAMAGED = "download it again"
_NOTES = ".notes"  # what is done, in the folder that is unpacked into
# A file name that every platform can have.
_PLAIN = re.compile(r'[^\s./\\:*?"<>|\0-\x1f][^/\\:*?"<>|\0-\x1f]{0,150}')
_HEADERS = {b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp"}

# A member of an archive: name, size, whether it is a file (not a link or a
# device), and what opens it.
_Member = tuple[str, int, bool, Callable[[], Any]]
_Save = Callable[[str, bytes], None]
# File -> the source that it is from, and its digest.
_Seen = dict[str, tuple[str, str]]


class _Done(NamedTuple):
    """What was unpacked of a source; noted as JSON."""

    state: list[int]  # size and modification time of the source
    size: int = 0  # in bytes, unpacked
    finished: bool = False
    files: dict[str, str] = {}  # name -> digest
    rows: list[list[str]] = []  # image, caption, split


def find_dataset(
    directory: Path, place: Path, layout: str, shares: tuple[float, float]
) -> datasets.Dataset:
    """Reads a dataset folder, and unpacks its archives if it needs them.

    Args:
        directory: the dataset folder.
        place: the folder in the cache to unpack into.
        layout: one of config.LAYOUTS.
        shares: of val and test, for `datasets.find_dataset`.

    Returns:
        The dataset; its summary says what was unpacked.

    Raises:
        UserError: if there is no dataset, or an archive cannot be used.
    """
    try:
        return datasets.find_dataset(directory, layout, *shares)
    except datasets.NothingFound as error:
        kind, shards, texts, others = _sources(directory)
        unused = f"Not understood or not needed: {', '.join(others)}."
        if not shards and others:
            raise UserError(f"{error}. {unused}") from None
        if not shards:
            raise
    with lock(place, wait=True):
        messages = _unpack(directory, place, shards + texts)
    plural = "s" * (len(shards) > 1)
    told = f"{directory}: {len(shards):,} {kind} file{plural}, unpacked"
    try:
        dataset = datasets.find_dataset(place, layout, *shares)
    except datasets.NothingFound as error:
        raise UserError(f"{told}, but {error}") from None
    messages += [unused] if others else []
    return dataset._replace(
        summary=f"{told}; {dataset.summary}",
        messages=[*messages, *dataset.messages],
    )


def _sources(directory: Path) -> tuple[str, list[str], list[str], list[str]]:
    """The kind of archive, the archives, the texts, and archives not used."""
    there = dict.fromkeys(datasets.list_files(directory).values())
    paths = [
        path
        for path in there
        if (directory / path).is_file() and not _is_by_product(path, there)
    ]

    def ending(endings: tuple[str, ...]) -> list[str]:
        return [path for path in paths if path.lower().endswith(endings)]

    found = {kind: ending(endings) for kind, endings in _KINDS.items()}
    kind = next(filter(found.get, found), "archive")
    shards = found[kind]
    known = (*itertools.chain(*_KINDS.values()), *_NOT_UNDERSTOOD)
    others = [path for path in ending(known) if path not in shards]
    return kind, shards, ending(_TEXTS), others


def _is_by_product(path: str, there: dict[str, None]) -> bool:
    """Whether a tool has left a file beside the data."""
    stem, ending = posixpath.splitext(path)
    if ending == ".parquet":  # img2dataset: the addresses of a tar's images
        return not there.keys().isdisjoint((stem + ".tar", stem + ".tar.gz"))
    # datasets: what was computed of an Arrow folder
    return fnmatch.fnmatch(posixpath.basename(path), "cache-*.arrow")


# --- what is done, and what is left ---------------------------------------


def _unpack(directory: Path, place: Path, sources: list[str]) -> list[str]:
    """Unpacks what is left; returns lines that the user should see."""
    _check_source(directory, place)
    done = {each: _load(directory, place, each) for each in sources}
    states = {name: each.state for name, each in done.items()}
    complete = place / _NOTES / "complete.json"
    found = read_json(complete)
    if found.get("states") == states:
        return found["messages"]
    left = [name for name, each in done.items() if not each.finished]
    for name in tqdm(left, "Checking archives", unit="file", delay=2):
        done[name] = done[name]._replace(size=_look(directory / name))
    there = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    check_disk(place, sum(each.size for each in done.values()) - there)
    seen = {
        file: (name, digest)
        for name, each in done.items()
        for file, digest in each.files.items()
    }
    complete.unlink(missing_ok=True)
    if "captions.csv" not in seen:
        (place / "captions.csv").unlink(missing_ok=True)
    source = {"source": _seen_from(place, directory)}
    write_json(place / _NOTES / "source.json", source, indent=None)
    names = {x.casefold(): x for x in seen} if _ignores_case(place) else None
    total = sum(done[name].size for name in left)
    with tqdm(
        desc="Unpacking", total=total, unit="B", unit_scale=True, delay=2
    ) as bar:
        for name in left:
            done[name] = _unpack_source(
                directory, place, name, done[name], seen, names, bar
            )
    notes = {_note(place, name) for name in sources}
    _sweep(place, {*seen}, {place / _NOTES / "source.json", *notes})
    messages = _write_captions(place, done, seen)
    noted = {"states": states, "messages": messages}
    write_json(complete, noted, indent=None)
    return messages


def _ignores_case(place: Path) -> bool:
    """Whether the disk takes names that differ in case for the same."""
    return (place / _NOTES.upper()).exists()


def _seen_from(place: Path, directory: Path) -> str:
    """The path of a folder from another: a copied project stays itself."""
    with contextlib.suppress(ValueError):  # two drives of Windows
        return os.path.relpath(directory.resolve(), place.resolve())
    return str(directory.resolve())


def _check_source(directory: Path, place: Path) -> None:
    """Refuses to mix the images of two folders."""
    was = read_json(place / _NOTES / "source.json").get("source", "")
    home = (place / was).resolve()
    if was and home != directory.resolve() and home.is_dir():
        raise UserError(
            f"{place} was made from the dataset in {home}: give the one in "
            f"{directory} another name with --dataset NAME, or delete {place}"
        )


def _note(place: Path, source: str) -> Path:
    digest = hashlib.blake2b(source.encode("utf-8", "replace"), digest_size=8)
    return place / _NOTES / f"{digest.hexdigest()}.json"


def _load(directory: Path, place: Path, source: str) -> _Done:
    """What was noted of a source; nothing if it has changed since."""
    status = (directory / source).stat()
    state = [status.st_size, status.st_mtime_ns]
    found = read_json(_note(place, source))
    return _Done(**found) if found.get("state") == state else _Done(state)


def _sweep(place: Path, files: set[str], notes: set[Path]) -> None:
    """Deletes what is of no source any more."""
    for path in place.rglob("*"):
        name = path.relative_to(place).as_posix()
        if path.is_file() and name not in files and path not in notes:
            path.unlink()


def _write_captions(
    place: Path, done: dict[str, _Done], seen: _Seen
) -> list[str]:
    """Writes captions.csv, if there are captions image by image."""
    rows = [row for each in done.values() for row in each.rows]
    if not rows or "captions.csv" in seen:
        return []
    write_csv(place / "captions.csv", rows, ["image", "caption", "split"])
    told = {image for image, *_ in rows}
    bare = [name for name in seen if _is_image(name) and name not in told]
    lost = sorted(told - seen.keys())
    return [
        f"{len(names):,} {what} left out, such as {names[0]}."
        for names, what in (
            (bare, "images without a caption are"),
            (lost, "captioned images are missing and"),
        )
        if names
    ]


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in ENDINGS


# --- one source -----------------------------------------------------------


def _unpack_source(
    directory: Path,
    place: Path,
    source: str,
    done: _Done,
    seen: _Seen,
    names: dict[str, str] | None,
    bar: Any,
) -> _Done:
    """Unpacks an archive or a table, or copies a text; adds to `seen`.

    Args:
        directory: the dataset folder.
        place: the folder in the cache.
        source: the file below `directory`.
        done: what was noted of it.
        seen: the files of all sources.
        names: the same in lower case -> as they are called; None where the
            disk tells them apart.
        bar: shows the progress.

    Returns:
        What is to be noted of it.
    """
    path, note = directory / source, _note(place, source)
    # It was begun, and has not changed: files that are equal are kept.
    begun = read_json(note).get("state") == done.state
    write_json(note, done._asdict(), indent=None)
    mine = {}

    def save(name: str, data: bytes) -> None:
        digest = hashlib.blake2b(data, digest_size=8).hexdigest()
        twin = (
            name if names is None else names.setdefault(name.casefold(), name)
        )
        if twin != name:
            raise UserError(
                f"{path} holds {name}, and {directory / seen[twin][0]} holds "
                f"{twin}, which are the same file on this disk: rename one, or "
                "give --data-dir on a case-sensitive disk"
            )
        first, known = seen.setdefault(name, (source, digest))
        if known != digest:
            raise UserError(
                f"{path} and {directory / first} hold two files called "
                f"{name}: rename one, or take one of the two out of the folder"
            )
        if name not in mine:
            _write(place / name, data, begun)
        mine[name] = digest
        bar.update(len(data))

    prefix = _split_of(source)
    if path.name.lower().endswith(_TEXTS):
        save(source, path.read_bytes())
        rows: list[Row] = []
    elif path.suffix.lower() in (".parquet", ".arrow"):
        rows = _unpack_table(path, source, prefix, save)
    else:
        rows = _unpack_archive(path, prefix, save)
    listed = [[*row[:3]] for row in rows]
    done = done._replace(finished=True, files=mine, rows=listed)
    # The images must be on the disk before the note that they are.
    if len(mine) > 1 and hasattr(os, "sync"):
        os.sync()
    write_json(note, done._asdict(), indent=None)
    return done


def _write(target: Path, data: bytes, begun: bool) -> None:
    """Writes a file atomically, unless it is there already."""
    try:
        if begun and target.is_file() and target.read_bytes() == data:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(".part")
        part.write_bytes(data)
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}") from None


def _split_of(source: str) -> str:
    """The split that train-00000-of-00003.parquet or TEST/0.tar is of.

    Zips are unpacked as they are, whatever they are called.
    """
    if source.lower().endswith(".zip"):
        return ""
    words = itertools.chain(
        *(re.split(r"[\W\d_]+", part) for part in source.split("/")[::-1])
    )
    return next(filter(None, map(caption_files.split_name, words)), "")


def _look(path: Path) -> int:
    """Checks a source before anything is written; returns its unpacked size."""
    if path.name.lower().endswith(_TEXTS):
        return path.stat().st_size
    size = 0
    if path.suffix.lower() in (".parquet", ".arrow"):
        for batch in _batches(path):
            _table_columns(path, batch.schema)
            size += batch.nbytes
            _check_growth(path, size)
        return size
    return sum(size for _, size, _ in _members(path))


def _check_growth(path: Path, size: int) -> None:
    if size > max(MAX_BYTES, MAX_RATIO * path.stat().st_size):
        raise UserError(
            f"{path} would grow more than {MAX_RATIO}-fold, to over "
            f"{size / 1e9:.1f} GB, which photographs never do: not unpacked"
        )


# --- archives -------------------------------------------------------------


def _unpack_archive(path: Path, prefix: str, save: _Save) -> list[Row]:
    """Saves an archive's files; returns the captions beside its images."""
    images, texts = {}, {}
    for name, _, data in _members(path, read=True):
        name = posixpath.join(prefix, name)
        stem, ending = posixpath.splitext(name)
        if ending in datasets.SIDECARS and len(data) < _MAX_SIDECAR:
            texts[name] = data
        else:
            save(name, data)
        if _is_image(name):
            images[stem] = name
    stems = {posixpath.splitext(name)[0] for name in texts}
    has_sidecars = not stems.isdisjoint(images)
    records = []
    for name, data in texts.items():
        stem, ending = posixpath.splitext(name)
        listing = datasets.is_caption_file(name) or splits.is_list(name)
        if stem not in images and (listing or not has_sidecars):
            save(name, data)
        # WebDatasets have both; the text is the caption alone.
        elif ending == ".txt" or f"{stem}.txt" not in texts:
            text = data.decode("utf-8-sig", "as-windows-1252")
            image = images.get(stem, stem)
            records.append(caption_files.read_sidecar(image, text))
    kept = [*filter(None, records)]
    return [*caption_files.read_records(kept, Notes([], [], []))]


def _members(
    path: Path, read: bool = False
) -> Iterator[tuple[str, int, bytes]]:
    """The files in an archive: name, size and, to be read, the content.

    Raises:
        UserError: if it is damaged, would write outside the folder, or was
            made to fill the disk.
    """
    total = 0
    members = _zip if path.suffix.lower() == ".zip" else _tar
    with reading(path, DAMAGED):
        for name, size, is_file, opens in members(path):
            name = caption_files.as_text(name).replace("\\", "/")
            reason = datasets.unsafe(name)
            if reason or not is_file:
                raise UserError(
                    f"{path} holds {name!r} ({reason or 'a link or device'}), "
                    "which may lead out of the folder: not unpacked"
                )
            total += size
            _check_growth(path, total)
            if size > MAX_BYTES:
                raise UserError(
                    f"{path} holds {name!r} ({size / 1e9:.1f} GB), too large "
                    "for a photograph: not unpacked"
                )
            name = posixpath.normpath(name)
            parts = name.split("/")
            # Nor does `datasets` read what is hidden, or a Mac's shadows.
            if not any(p[0] == "." or p == "__MACOSX" for p in parts):
                yield name, size, opens().read() if read else b""


def _zip(path: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            is_file = kind in (0, stat.S_IFREG)
            opens = functools.partial(archive.open, member)
            # A folder of Windows may end in its own separator.
            if not member.filename.endswith(("/", "\\")):
                yield member.filename, member.file_size, is_file, opens


def _tar(path: Path) -> Iterator[_Member]:
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isdir():
                opens = functools.partial(archive.extractfile, member)
                yield member.name, member.size, member.isreg(), opens
        # Where tarfile finds no member it takes that for the end: two blocks
        # of zeros, but also nothing at all, or a member that is damaged.
        block, file = tarfile.BLOCKSIZE, archive.fileobj
        assert file is not None
        if file.tell() != archive.offset + block or any(file.read(block)):
            last = "".join(archive.getnames()[-1:])
            raise tarfile.ReadError(f"the tar breaks off after {last}")


# --- tables ---------------------------------------------------------------


def _unpack_table(
    path: Path, source: str, prefix: str, save: _Save
) -> list[Row]:
    """Saves the images in a table; its captions."""
    stem = posixpath.splitext(source)[0].replace("/", "-")
    records = []
    nameless: dict[bytes, str] = {}
    numbers = itertools.count()
    for batch in _batches(path):
        image, columns = _table_columns(path, batch.schema)
        for row, number in zip(batch.to_pylist(), numbers, strict=False):
            fields = [*row.values()]
            data, told = fields[image], fields[columns.image]
            if isinstance(data, dict):
                told = data.get("path") if told is data else told
                data = data["bytes"]
            data = data or b""
            if not isinstance(told, str) or not _PLAIN.fullmatch(told):
                # A photograph may be in a row for each of its captions.
                digest = hashlib.blake2b(data).digest()
                told = nameless.setdefault(digest, f"{stem}-{number}")
            ending = "" if _is_image(told) else _HEADERS.get(data[:4], ".jpg")
            own_split = "split" in columns.names
            name = posixpath.join("" if own_split else prefix, told + ending)
            if data:
                save(name, data)
            # Tables may hold masks or thousands of numbers for each image.
            kept = [
                value if i in columns.captions or isinstance(value, str) else ""
                for i, value in enumerate(fields)
            ]
            kept[columns.image] = name
            records.append((kept, columns))
    return [*caption_files.read_records(records, Notes([], [], []))]


def _batches(path: Path) -> Iterator[Any]:
    """The rows of a table, some at a time."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise UserError(
            f"{path} needs pyarrow: pip install -r requirements-parquet.txt"
        ) from None
    with reading(path, DAMAGED):
        if path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(path) as table:
                yield from table.iter_batches(_BATCH)
            return
        with pyarrow.memory_map(str(path)) as data:
            for batch in ipc.open_stream(data):
                for start in range(0, batch.num_rows, _BATCH):
                    yield batch.slice(start, _BATCH)


def _table_columns(path: Path, schema: Any) -> tuple[int, Any]:
    """The column that holds the images, and those of names and captions."""
    names = [*schema.names]
    kinds = map(str, schema.types)
    images = [
        place
        for place, kind in enumerate(kinds)
        if re.match(r"(large_)?binary|struct<.*\bbytes: ", kind)
    ]
    # Tables may hold thumbnails or masks too.
    images.sort(key=lambda each: names[each] not in IMAGE_COLUMNS)
    text = ["" if i in images else name for i, name in enumerate(names)]
    columns = caption_files.find_columns(text)
    if images and not columns:  # the images' names are in the same column
        text[images[0]] = IMAGE_COLUMNS[0]
        columns = caption_files.find_columns(text)
    if not images or not columns:
        raise UserError(
            f"{path} has no column of {'captions' if images else 'images'}, "
            f"only {', '.join(names)}: see data/README.md for the columns, or "
            "take it out of the folder"
        )
    return images[0], columns
