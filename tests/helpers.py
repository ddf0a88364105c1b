"""Helpers of many tests; nothing heavy is imported."""

from collections.abc import Callable
from pathlib import Path

import pytest

from config import UserError


def refusal(function: Callable, *arguments, **options) -> str:
    """The one line of the UserError that a call has to raise."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def files_in(folder: Path) -> dict[str, bytes]:
    """Path below a folder -> content, of all files but locks."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }
