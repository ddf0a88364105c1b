"""Standard input, output and error, the same wherever they lead.

Files and pipes are UTF-8, whatever the locale; a terminal keeps its encoding,
and what it cannot show is escaped. A reader that has gone (`| head`) does not
stop a script whose job is to write files.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Descriptor(io.FileIO):
    """A file descriptor that may lose its reader."""

    def __init__(self, number: int, end_with_reader: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self.end_with_reader = end_with_reader

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # Windows calls a write to a closed pipe an invalid argument.
            closed = isinstance(error, ConnectionError)
            closed = closed or error.errno == errno.EINVAL
            # What cannot be written now must not fail again at the exit.
            _discard(self.fileno())
            if closed and self.end_with_reader:
                raise SystemExit(0) from None
            if not closed and self.fileno() == 1:
                error.filename = "standard output"
                raise
        return memoryview(data).nbytes


def prepare(end_with_reader: bool) -> None:
    """Prepares the standard streams of a script.

    Args:
        end_with_reader: whether the script ends, successfully, when nobody
            reads its standard output any more; otherwise it carries on.
    """
    for number in (1, 2):
        try:
            os.fstat(number)
        except OSError:  # started with `>&-`: no file may get this number
            _discard(number)
    sys.stdout = _output(sys.stdout, sys.__stdout__, 1, end_with_reader)
    sys.stderr = _output(sys.stderr, sys.__stderr__, 2, False)
    if sys.stdin is sys.__stdin__ and isinstance(sys.stdin, io.TextIOWrapper):
        # A list of file names; a name need not be valid text.
        encoding = None if sys.stdin.isatty() else "utf-8-sig"
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")


def _output(
    stream: TextIO, original: TextIO | None, number: int, end_with_reader: bool
) -> TextIO:
    """The stream that a script writes to instead of the interpreter's own."""
    if stream is not original:
        return stream  # somebody captures it
    if isinstance(stream, io.TextIOWrapper) and stream.isatty():
        stream.reconfigure(errors="backslashreplace")
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(number, end_with_reader)),
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


@contextlib.contextmanager
def silent_errors() -> Iterator[None]:
    """Discards standard error, and what is written to it past Python."""
    sys.stderr.flush()
    saved = os.dup(2)
    _discard(2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


def _discard(number: int) -> None:
    """Redirects a file descriptor to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)
