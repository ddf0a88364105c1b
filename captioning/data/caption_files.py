"""Caption files of every layout -> rows of image, caption and split.

data/README.md shows the layouts. As far as possible, a file's contents say how
to read it: any separator, any usual column name, one caption per cell or a list
of them.
"""

import ast
import codecs
import contextlib
import csv
import io
import itertools
import json
import posixpath
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from captioning.files import reason
from config import SPLIT_SYNONYMS, SPLITS, UserError

# The first of these that a table has names its images. A column "image" that
# stands beside "filename" holds the image itself in tables exported from
# Hugging Face.
IMAGE_COLUMNS = (
    "file_name",
    "filename",
    "image_name",
    "image_file",
    "image_path",
    "image",
    "img_name",
    "img",
    "path",
)
_CAPTION_COLUMNS = (
    "caption",
    "comment",
    "raw",
    "text",
    "sentence",
    "description",
)
# These tell the split of a table without a column `split`, if all their values
# are names of splits.
_LIKE_SPLIT = ("subset", "set", "fold", "partition")
# COCO's validation images that Karpathy moved to training are "restval".
_SPLIT_NAMES = {
    "restval": "train",
    "training": "train",
    "testing": "test",
    **SPLIT_SYNONYMS,
    **dict(zip(SPLITS, SPLITS, strict=True)),
}
# Hugging Face's descriptions of a dataset, which have no captions.
NO_CAPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Without a mark, the zeros among the first four bytes tell the encoding: a file
# of captions begins with ASCII characters. True is a byte that is not zero.
_NOT_ZERO: dict[tuple[bool, ...], str] = {
    (True, False, False, False): "utf-32-le",
    (False, False, False, True): "utf-32-be",
    (True, False, True, False): "utf-16-le",
    (False, True, False, True): "utf-16-be",
}
_SURROGATES = re.compile("[\ud800-\udfff]")
# The line that tells Excel the separator of a CSV file.
_EXCEL_SEPARATOR = re.compile(r'"?sep=(.)"?[^\n]*\n', re.IGNORECASE)
_TOKEN_LINE = re.compile(r"[^\t\n]+#\d+\t")
# Flickr8k-CN names the language, and has a space for the tab.
_LANGUAGE = re.compile(r"^(\S+)#[a-z]+#\d+[ \t]")
# A list of strings as Python, pandas, NumPy and databases print it, nested or
# not. NumPy puts no commas: Python would join the strings.
_QUOTED = r"""[bBuU]?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_TYPE = r"(?:array|list|tuple|set|(?:np|numpy)\.str_)\("
_DTYPE = r"""dtype=(?:'[^']*'|"[^"]*"|[\w<>|=]+)"""
_PRINTED_LIST = re.compile(
    rf"(?:{_TYPE}|[\[({{])"
    rf"(?:{_QUOTED}|{_TYPE}|{_DTYPE}|None|nan|NULL|[\[\](){{}}\s,])*"
    r"[\])}]",
    re.DOTALL,
)
_LIST_BEGINS = re.compile(
    rf"(?:{_TYPE})?[\[{{](?:\s|{_TYPE}|[\[({{])*(?:[bu]?['\"]|\])"
)


class Row(NamedTuple):
    """A caption as a file has it."""

    image: str
    caption: str
    split: str = ""
    image_id: int | None = None


class Notes(NamedTuple):
    """What the user is told about a dataset."""

    skipped: list[tuple[str, str]]  # image, reason
    repaired: list[tuple[str, str]]  # image or file, reason
    messages: list[str]  # for the screen


def split_name(text: str) -> str:
    """train, val or test for any usual name of a split; else empty."""
    return _SPLIT_NAMES.get(text.strip().lower(), "")


def read(paths: Sequence[Path], layout: str, notes: Notes) -> list[list[Row]]:
    """Reads the caption files of one dataset.

    Args:
        paths: the files.
        layout: one of LAYOUTS.
        notes: collects what was skipped or repaired, and what to tell the user.

    Returns:
        The rows of each file.

    Raises:
        UserError: if a file is of another kind, or there is no caption.
    """
    _, reader = LAYOUTS[layout]
    rows = [list(reader(read_text(p, notes), p, notes)) for p in paths]
    if not any(rows):
        skipped = [f"{name}: {reason}; " for name, reason in notes.skipped[:1]]
        raise UserError(
            f"{paths[0]}: no captions in it are in the {layout} layout; "
            f"{''.join(skipped)}see data/README.md, or choose another with "
            "--layout"
        )
    return rows


# --- text -----------------------------------------------------------------


def read_text(path: Path, notes: Notes) -> str:
    r"""Reads a text file in any usual encoding; its lines end in \n.

    UTF-16 and UTF-32 are recognised by their byte order mark, or by the zeros
    among their first bytes. Of anything else, the bytes that are not UTF-8 are
    read as Windows-1252.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    mark = next(filter(data.startswith, _BYTE_ORDER_MARKS), b"")
    not_zero = tuple(map(bool, data[:4]))
    encoding = _BYTE_ORDER_MARKS.get(mark) or _NOT_ZERO.get(not_zero)
    if encoding:
        text = data[len(mark) :].decode(encoding, errors="replace")
        family = encoding[: len("utf-16")].upper()
        notes.messages.append(f"{path} is not UTF-8: read as {family}.")
    else:
        text = _decode_utf_8(data.removeprefix(codecs.BOM_UTF8), path, notes)
    if "\0" in text:
        text = text.replace("\0", "")
        notes.repaired.append((path.name, "NUL bytes removed"))
        notes.messages.append(f"{path} contains NUL bytes: removed.")
    text = text.replace("\r\n", "\n")
    # A lone carriage return ends lines only in files from old Macs.
    return text.replace("\r", " " if "\n" in text else "\n")


def _decode_utf_8(data: bytes, path: Path, notes: Notes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        number = data.count(b"\n", 0, error.start) + 1
        line = data[start : error.start + 40].partition(b"\n")[0]
    sample = line.decode("utf-8", errors="as-windows-1252")[-60:]
    sample = "".join(filter(str.isprintable, sample))
    notes.repaired.append((path.name, "not UTF-8: read as Windows-1252"))
    notes.messages.append(
        f"{path} is not UTF-8: read as Windows-1252, first in line {number:,} "
        f"({sample}). If that looks wrong, save the file as UTF-8."
    )
    return data.decode("utf-8", errors="as-windows-1252")


def _as_windows_1252(error: UnicodeError) -> tuple[str, int]:
    """Decodes only the bytes that are not UTF-8 as Windows-1252."""
    assert isinstance(error, UnicodeDecodeError)
    data = error.object[error.start : error.end]
    return data.decode("cp1252", errors="replace"), error.end


codecs.register_error("as-windows-1252", _as_windows_1252)


def _read_token(text: str, path: Path, notes: Notes) -> Iterator[Row]:
    for line in text.split("\n"):
        image, tab, caption = _LANGUAGE.sub(r"\1\t", line).partition("\t")
        if image and tab:
            yield Row(image, caption)
        elif line.strip():
            notes.skipped.append((line[:80], "row without a caption"))


# --- JSON -----------------------------------------------------------------


def _parse_document(text: str, path: Path, key: str) -> dict[str, Any]:
    """A JSON object with a list of images and one under `key`."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({reason(error)}): download it again"
        ) from None
    for each in ("images", key):
        found = document.get(each) if isinstance(document, dict) else None
        if not isinstance(found, list):
            raise UserError(
                f"{path} has no list {each!r}; see data/README.md, or choose "
                "other captions with --layout"
            )
    return document


def _dicts(items: Any) -> list[dict[str, Any]]:
    """The objects in what should be a list of objects."""
    items = items if isinstance(items, list) else []
    return [item for item in items if isinstance(item, dict)]


def as_text(value: Any) -> str:
    """A text that can be written to a file; JSON can hold half an emoji."""
    return _SURROGATES.sub("?", value) if isinstance(value, str) else ""


def _number(value: Any) -> int | None:
    whole = isinstance(value, int) and abs(value) < 2**63
    return int(value) if whole else None


def _read_karpathy(text: str, path: Path, notes: Notes) -> Iterator[Row]:
    for image in _dicts(_parse_document(text, path, "images")["images"]):
        folder, file = map(as_text, map(image.get, ("filepath", "filename")))
        name = posixpath.join(folder, file)
        split = as_text(image.get("split"))
        number = _number(image.get("cocoid"))
        for sentence in _dicts(image.get("sentences")):
            yield Row(name, as_text(sentence.get("raw")), split, number)


def _read_coco(text: str, path: Path, notes: Notes) -> Iterator[Row]:
    document = _parse_document(text, path, "annotations")
    # captions_train2017.json
    split = path.stem.lower().removeprefix("captions_").rstrip("0123456789")
    # Keys are text: an image_id that is a list could not be looked up.
    names = {
        str(image.get("id")): as_text(image.get("file_name"))
        for image in _dicts(document["images"])
    }
    for annotation in _dicts(document["annotations"]):
        number = annotation.get("image_id")
        name = names.get(str(number), "")
        caption = as_text(annotation.get("caption"))
        yield Row(name, caption, split_name(split), _number(number))


def _read_objects(text: str, path: Path, notes: Notes) -> Iterator[Row]:
    """JSON objects with the fields of a table: in a list, or one per line.

    An object of image names and captions is understood too.
    """
    try:
        objects = json.loads(text)
    except (ValueError, RecursionError):
        objects = list(_parse_lines(text, notes))
    if isinstance(objects, dict) and not find_columns(objects):
        objects = [{"image": i, "caption": c} for i, c in objects.items()]
    records: list[Record] = []
    for each in objects if isinstance(objects, list) else [objects]:
        columns = find_columns(each) if isinstance(each, dict) else None
        if columns:
            records.append(([*each.values()], columns))
        else:
            reason = "no fields image and caption"
            notes.skipped.append((json.dumps(each)[:80], reason))
    yield from read_records(records, notes)


def _parse_lines(text: str, notes: Notes) -> Iterator[Any]:
    """The values of a file with one JSON value per line."""
    for line in filter(str.strip, text.split("\n")):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            notes.skipped.append((line[:80], "line that is not valid JSON"))


# --- tables ---------------------------------------------------------------


class _Columns(NamedTuple):
    """Where a table has what."""

    image: int
    captions: list[int]
    names: list[str]


# What a line or an object has, and where.
Record = tuple[Sequence[Any], _Columns]


def read_sidecar(image: str, text: str) -> Record | None:
    """Reads the file beside an image that has the image's name.

    Args:
        image: its name.
        text: one caption per line; or a JSON object with the fields of a
            table, or a JSON list of captions.

    Returns:
        The image's record; None if there is no caption in it.
    """
    value: Any = text.splitlines()
    if text.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text)
    fields = value if isinstance(value, dict) else {"caption": value}
    columns = find_columns([IMAGE_COLUMNS[0], *fields])
    return ([image, *fields.values()], columns) if columns else None


def find_columns(names: Iterable[Any]) -> _Columns | None:
    """Finds the columns of a table, whatever their case.

    Args:
        names: of all its columns.

    Returns:
        Where they are; None without one for images and one for captions.
    """
    names = [re.sub(r"[\s-]+", "_", str(n).strip().lower()) for n in names]
    image = next((names.index(n) for n in IMAGE_COLUMNS if n in names), None)
    # caption, captions, or caption_0 to caption_4
    groups = (
        [i for i, n in enumerate(names) if re.fullmatch(rf"{c}s?_?\d*", n)]
        for c in _CAPTION_COLUMNS
    )
    captions = next(filter(None, groups), None)
    if image is None or captions is None:
        return None
    return _Columns(image, captions, names)


def _read_table(text: str, path: Path, notes: Notes) -> Iterator[Row]:
    """A table whose first line names its columns, with any separator."""
    text = text.lstrip("\n")
    if _TOKEN_LINE.match(text):
        yield from _read_token(text, path, notes)
        return
    marked = _EXCEL_SEPARATOR.match(text)
    text = text[marked.end() :] if marked else text
    first_line = text.partition("\n")[0]
    for separator in marked[1] if marked else ",;\t|":
        options: dict[str, Any] = {
            "delimiter": separator,
            "skipinitialspace": f"{separator} " in first_line,
        }
        header = next(csv.reader([first_line[:2000]], **options), [])
        columns = find_columns(header)
        if columns:
            break
    else:
        raise UserError(
            f"{path}: the first line must name the columns, such as image and "
            f"caption; it is {first_line[:80]!r}; see data/README.md"
        )
    if separator == "|" and options["skipinitialspace"]:
        # Kaggle's results.csv: quotes are part of the captions.
        options["quoting"] = csv.QUOTE_NONE
    glue = separator + " " * options["skipinitialspace"]
    fitted = [
        _fit(record, columns, glue, notes)
        for record in _csv_records(text, options, path, notes)[1:]
    ]
    yield from read_records([(each, columns) for each in fitted if each], notes)


def _read_table_or_objects(
    text: str, path: Path, notes: Notes
) -> Iterator[Row]:
    is_table = path.suffix.lower() in (".csv", ".tsv", ".txt")
    return (_read_table if is_table else _read_objects)(text, path, notes)


def _csv_records(
    text: str, options: dict[str, Any], path: Path, notes: Notes
) -> list[list[str]]:
    """The records of a CSV file, even if its quotes do not match."""
    try:
        return list(csv.reader(io.StringIO(text), strict=True, **options))
    except csv.Error:
        # A quote without its partner would swallow the rows that follow.
        reason = "quotes that do not match: read line by line"
        notes.repaired.append((path.name, reason))
        notes.messages.append(f"{path} has {reason}.")
    records: list[list[str]] = []
    for line in text.split("\n"):
        try:
            records += csv.reader([line], **options)
        except csv.Error:
            notes.skipped.append((line[:80], "row that is not valid CSV"))
    return records


def _fit(
    record: list[str], columns: _Columns, glue: str, notes: Notes
) -> list[str]:
    """A record with one field per column; empty if it has no caption."""
    width, caption = len(columns.names), columns.captions[0]
    while len(record) > width and not record[-1].strip():
        record.pop()
    surplus = len(record) - width
    if surplus > 0 and len(columns.captions) > 1:
        reason = f"row of {len(record)} fields under {width} columns"
        notes.skipped.append((record[columns.image][:80], reason))
        return []
    if surplus > 0:
        whole = slice(caption, caption + surplus + 1)
        record[whole] = [glue.join(record[whole])]
        reason = f"caption with {glue.strip(' ')!r} but no quotes"
        notes.repaired.append((record[columns.image], reason))
    # Flickr30k has a row "2199200615.jpg| 4   A dog runs ...".
    cut = columns.image < caption == len(record)
    if cut and columns.names[caption - 1].endswith("number"):
        damaged = re.match(r"(\d+)\s+(.*)", record[-1])
        if damaged:
            reason = "no separator before the caption"
            notes.repaired.append((record[columns.image], reason))
            record[-1:] = damaged.groups()
    if len(record) > max(columns.image, caption):
        return record + [""] * (width - len(record))
    if any(field.strip() for field in record):
        notes.skipped.append((record[0][:80], "row without a caption"))
    return []


def read_records(records: Sequence[Record], notes: Notes) -> Iterator[Row]:
    """The captions of all records of a file.

    Args:
        records: a value of a caption column may be a list.
        notes: takes what is skipped.

    Yields:
        A row per caption.
    """
    like_split = (
        name
        for name in _LIKE_SPLIT
        if all(split_name(_cell(each, name)) for each in records)
    )
    has_split = any("split" in columns.names for _, columns in records)
    split = "split" if has_split else next(like_split, "split")
    for each in records:
        yield from _rows_of(*each, _cell(each, split), notes)


def _cell(record: Record, name: str) -> str:
    """The text in a column of a record; empty if there is none."""
    fields, columns = record
    there = name in columns.names
    return as_text(fields[columns.names.index(name)]) if there else ""


def _rows_of(
    fields: Sequence[Any], columns: _Columns, split: str, notes: Notes
) -> Iterator[Row]:
    """The captions of one record, whose values may be lists."""
    image = as_text(fields[columns.image])
    try:
        lists = [_captions_in(fields[column]) for column in columns.captions]
    except (ValueError, RecursionError):
        notes.skipped.append((image, "list of captions that cannot be read"))
        return
    # Not every image has as many captions as the table has columns.
    captions = filter(str.strip, itertools.chain(*lists))
    for caption in [*captions] or [""]:
        yield Row(image, caption, split)


def _captions_in(value: Any) -> list[str]:
    """The captions in a cell: one, or those of a list of strings.

    Raises:
        ValueError: if it is a list that cannot be read.
    """
    text = as_text(value).strip()
    if _LIST_BEGINS.match(text) or _PRINTED_LIST.fullmatch(text):
        value = _parse_list(text)
    return _texts(value)


def _texts(value: Any) -> list[str]:
    """The texts in a list, however deep; anything but a text is empty."""
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    if isinstance(value, dict):
        raise ValueError("an object instead of a text")
    return [as_text(value)]


def _parse_list(text: str) -> Any:
    """Parses a list of strings as JSON, Python, pandas or NumPy write it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if not _PRINTED_LIST.fullmatch(text):
            raise ValueError("neither JSON nor Python") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a backslash before any letter
        try:
            found = re.findall(rf"{_DTYPE}|({_QUOTED})", text, re.DOTALL)
            values = [
                ast.literal_eval(quoted.replace("\n", " "))
                for quoted in filter(None, found)
            ]
        except SyntaxError as error:  # "\\x" without digits
            raise ValueError(str(error)) from None
    return [
        each.decode("utf-8", "replace") if isinstance(each, bytes) else each
        for each in values
    ]


# Layout -> (patterns of its caption files in lower case, its reader). The order
# is the order of preference: first what has a split of its own, last the names
# that say least.
_Reader = Callable[[str, Path, Notes], Iterator[Row]]
LAYOUTS: dict[str, tuple[tuple[str, ...], _Reader]] = {
    "karpathy": (("dataset_*.json", "dataset.json"), _read_karpathy),
    "huggingface": (("flickr_annotations_*.csv",), _read_table),
    "coco": (("captions_*.json",), _read_coco),
    "plain": (
        ("captions.csv", "captions.tsv", "captions.json*"),
        _read_table_or_objects,
    ),
    "kaggle30k": (("results.csv",), _read_table),
    "kaggle8k": (("captions.txt",), _read_table),
    "token": (("*.token.txt", "*.token", "*.caption.txt"), _read_token),
    "imagefolder": (("metadata.csv", "metadata.jsonl"), _read_table_or_objects),
    # No file of its own: `datasets` looks beside the images.
    "sidecar": ((), _read_table_or_objects),
}
