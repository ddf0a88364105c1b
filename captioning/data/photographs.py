"""Finds the photographs that a command line names."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from unicodedata import normalize

from captioning.data.images import ENDINGS

_KINDS = 8  # of other files, that are listed by their endings


class Found(NamedTuple):
    """What was found."""

    photographs: list[str]  # paths of files, each file once
    missing: list[tuple[str, str]]  # name, and why there is nothing
    others: list[tuple[str, str]]  # folder, and what else it contains


def find(names: Iterable[str], listed: Iterable[str]) -> Found:
    """Finds photographs.

    A file that is named is taken, whatever its ending. From a folder and its
    subfolders all files are taken that have the ending of an image format,
    except hidden ones. A pattern (`*.jpg`) is expanded, for shells that do
    not.

    Args:
        names: files, folders, patterns, and `-` for all of `listed`.
        listed: files and folders, one per line.

    Returns:
        The photographs in the order of the names, sorted within a folder.
    """
    found = Found([], [], [])
    paths: dict[str, str] = {}  # absolute path -> path as it was named
    for name in _expanded(names, listed):
        name = _on_disk(name)
        if os.path.isdir(name):
            taken = _in_folder(name, found)
        elif os.path.lexists(name):
            taken = [name]
        else:
            pattern = glob.has_magic(name)
            reason = "no file matches" if pattern else "no such file"
            found.missing.append((name, reason))
            continue
        for path in taken:
            paths.setdefault(os.path.normcase(os.path.abspath(path)), path)
    found.photographs.extend(paths.values())
    return found


def _expanded(names: Iterable[str], listed: Iterable[str]) -> Iterator[str]:
    """The names, with `-` and patterns replaced by what they stand for."""
    for name in names:
        if name == "-":
            yield from filter(None, (line.strip("\r\n") for line in listed))
        elif glob.has_magic(name) and not os.path.lexists(name):
            yield from sorted(glob.glob(name, recursive=True)) or [name]
        else:
            yield name


def _on_disk(name: str) -> str:
    """A name in the Unicode form that the disk has; macOS writes form D."""
    forms = (name, normalize("NFC", name), normalize("NFD", name))
    return next(filter(os.path.lexists, forms), name)


def _in_folder(folder: str, found: Found) -> list[str]:
    """The photographs in a folder; adds to `found` what else is there."""

    def unreadable(error: OSError) -> None:
        reason = (error.strerror or str(error)).lower()
        found.missing.append((str(error.filename), reason))

    photographs: list[str] = []
    others: Counter[str] = Counter()
    seen = {os.path.realpath(folder)}  # links may lead round in circles
    walk = os.walk(folder, onerror=unreadable, followlinks=True)
    for here, folders, files in walk:
        for each in list(folders):
            real = os.path.realpath(os.path.join(here, each))
            # macOS packs __MACOSX into its archives, with no photographs.
            if each.startswith(".") or each == "__MACOSX" or real in seen:
                folders.remove(each)
            seen.add(real)
        for each in files:
            ending = os.path.splitext(each)[1].lower()
            if each.startswith("."):
                continue
            if ending in ENDINGS:
                photographs.append(os.path.join(here, each))
            else:
                others[ending or "without extension"] += 1
    if others:
        kinds = [f"{count:,} {e}" for e, count in others.most_common(_KINDS)]
        more = ", ..." if len(others) > _KINDS else ""
        found.others.append(
            (folder, f"not photographs: {', '.join(kinds)}{more}")
        )
    return sorted(photographs)
