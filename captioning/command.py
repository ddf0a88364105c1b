"""The command line that all scripts share: flags, exit codes, one-line errors.

Nothing heavy is imported here, so that `--help` answers at once.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from captioning import job
from config import SPLIT_SYNONYMS, Config, UserError, group, resolve

BACKENDS = ("tensorflow", "jax")
DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


class Action(NamedTuple):
    """A flag or argument of one script, as argparse's add_argument takes it."""

    name: str
    options: dict[str, Any]


class Arguments(NamedTuple):
    """What the command line said."""

    config: Config
    given: dict[str, Any]  # the fields of Config that stood on the line
    actions: argparse.Namespace


class _Parser(argparse.ArgumentParser):
    """An argument parser that tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        _tell(message)
        raise SystemExit(WRONG_USAGE)


def _tell(text: str) -> None:
    """Prints an error as one line, whatever names are quoted in it."""
    line = "".join(c if c.isprintable() else " " for c in text)
    print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)


def _nearest(word: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, valid, 1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def _kind(kind: type) -> Callable[[str], Any]:
    """A reader for argparse with an error that a person understands."""
    wanted = {int: "a whole number", float: "a number", str: "text"}[kind]

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"wants {wanted}, not {text!r}"
            ) from None

    return read


def _name(choices: Sequence[str]) -> Callable[[str], str]:
    """A reader for one of some names."""

    def read(text: str) -> str:
        text = SPLIT_SYNONYMS.get(text, text) if "val" in choices else text
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f"knows {', '.join(choices)}, not {text!r}"
                + _nearest(text, choices)
            )
        return text

    return read


def _parser(description: str, actions: Sequence[Action]) -> _Parser:
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for action in actions:
        parser.add_argument(action.name, **action.options)
    groups: dict[str, Any] = {}
    for each in dataclasses.fields(Config):
        name = each.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(f"{name} fields")
        flag = "--" + each.name.replace("_", "-")
        text = f"{each.metadata['help']} (default: {each.default!r})"
        text = text.replace("%", "%%")
        if each.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif "choices" in each.metadata:
            options = {
                "type": _name(each.metadata["choices"]),
                "metavar": "NAME",
            }
        else:
            options = {
                "type": _kind(each.type),
                "metavar": each.type.__name__.upper(),
            }
        groups[name].add_argument(flag, help=text, **options)
    return parser


def parse(
    description: str,
    actions: Sequence[Action] = (),
    arguments: Sequence[str] | None = None,
) -> Arguments:
    """Reads the command line; ends the process if it is wrong.

    Args:
        description: what the script does, for --help.
        actions: the flags that only this script has.
        arguments: the command line; None takes it from sys.argv.

    Returns:
        The config with its open choices resolved, the fields that were given,
        and the actions.
    """
    parser = _parser(description, actions)
    try:
        known, unknown = parser.parse_known_args(arguments)
    except UserError as error:  # of a flag's own reader
        parser.error(str(error))
    if unknown:
        flags = [s for a in parser._actions for s in a.option_strings]
        word = unknown[0].split("=")[0]
        kind = "flag" if word.startswith("-") else "argument"
        hint = _nearest(word, flags) if kind == "flag" else "; see --help"
        parser.error(f"unknown {kind} {word}{hint}")
    names = {each.name for each in dataclasses.fields(Config)}
    given = {k: v for k, v in vars(known).items() if k in names}
    try:
        config = resolve(Config(**given), given)
    except UserError as error:
        parser.error(str(error))
    return Arguments(config, given, known)


def import_keras() -> None:
    """Imports Keras without what TensorFlow has to say of its build.

    It tells of instruction sets and absent GPUs on standard error, past
    Python, before its own switch for that (TF_CPP_MIN_LOG_LEVEL) counts; a
    user can do nothing about either.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow and JAX take GPU memory as they need it, and not all of it.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    _keep_freed_memory()
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        import keras

        _check_backend(keras.backend.backend())  # of keras.json
    except ImportError as error:
        raise UserError(
            f"Keras cannot be imported ({error}): install what is missing, or "
            f"set KERAS_BACKEND to {' or '.join(BACKENDS)}"
        ) from None
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


def _check_backend(name: str | None) -> None:
    if name and name not in BACKENDS:
        raise UserError(
            f"Keras's backend {name} is not supported: set KERAS_BACKEND to "
            + " or ".join(BACKENDS)
        )


def _keep_freed_memory() -> None:
    """Has glibc keep the memory that a step frees for the next step.

    By default it gives large blocks back to the system and gets them anew
    page by page, each page zeroed: a third of the time of a training step.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    # A second arena would not share what it keeps with the first.
    mallopt(M_ARENA_MAX, 1)


def _terminate(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def run(
    main: Callable[[Arguments], int | None],
    description: str,
    actions: Sequence[Action] = (),
) -> NoReturn:
    """Runs a script's main with the exit codes that all scripts share.

    0 done; 1 something in the data or the run is wrong, told in one line;
    2 wrong usage; 130 interrupted.

    Args:
        main: the script; it may return an exit code of its own.
        description: the script's docstring.
        actions: the flags that only this script has.
    """
    arguments = parse(description, actions)
    signal.signal(signal.SIGTERM, _terminate)
    # The name of a file need not be text, or text that a terminal can show.
    with contextlib.suppress(AttributeError):  # where they are no such streams
        sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        _check_backend(os.environ.get("KERAS_BACKEND"))
        code = main(arguments) or DONE
        sys.stdout.flush()
    except UserError as error:
        _tell(str(error))
        code = FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        _tell("interrupted; run it again to go on")
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        told = f"{where}{error.strerror or error}"
        if error.errno == errno.ENOSPC:
            told += ": make room and run it again, nothing is lost"
        _tell(told)
        code = FAILED
    if code and job.described():
        # At an orderly exit JAX would wait for processes that may be lost.
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def next_line(script: str, arguments: Arguments) -> str:
    """The command to run next, with the flags of this one that it needs.

    Args:
        script: its file name.
        arguments: of this script.
    """
    words = ["python", script]
    for name in [*group("place"), *group("data"), *group("encoder")]:
        if name in arguments.given:
            words += ["--" + name.replace("_", "-")]
            words += [shlex.quote(str(arguments.given[name]))]
    return " ".join(words)
