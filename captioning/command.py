"""The command line of all scripts: flags, exit codes, one-line errors.

Nothing heavy is imported here, so that `--help` answers at once.
"""

import argparse
import ctypes
import dataclasses
import errno
import functools
import json
import logging
import os
import platform
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from captioning import job, streams
from config import (
    FIELDS,
    GROUPS,
    SPLIT_SYNONYMS,
    Config,
    UserError,
    did_you_mean,
    flag,
    group,
    resolve,
)

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
BACKENDS = ("tensorflow", "jax")
CHOOSE_BACKEND = f"set KERAS_BACKEND to {' or '.join(BACKENDS)}"
VERSION = "1.0"
# The groups of fields that `--help` shows, and fields of other groups that name
# a run; `--help-all` shows the others too.
FIELDS_OF = {
    "preprocess.py": ("place", "data", "encoder"),
    "train.py": ("place", "model", "training"),
    "evaluate.py": ("place", "decoding"),
    "caption.py": ("place", "decoding"),
}
NAMING = ("dataset", "encoder", "encoder_weights")
# Of the fields shown, those that only one script uses.
OF_ONE = {"max_skipped_share": "preprocess.py", "split": "evaluate.py"}
# What to say of flags that people know from other programs.
ELSEWHERE = {
    "use --learning-rate": "--lr",
    "use --batch-images": "--batch-size --batch --bs",
    "use --encoder": "--model --backbone --arch",
    "use --run-name": "--checkpoint --ckpt --weights",
    "use --epochs": "--num-epochs --n-epochs",
    "use --checkpoints-dir": "--output --output-dir --out",
    "use --dataset-dir": "--data --data-root --root",
    "use --beam-size": "--beams --num-beams",
    "use --worker of preprocess.py; reading ahead needs no flag": (
        "--workers --num-workers"
    ),
    "not needed: the same command resumes": "--resume",
    "not needed: the backend finds the GPUs, and CUDA_VISIBLE_DEVICES hides "
    "them": "--device --gpu --gpus --cuda",
}

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8

# The flags or arguments of one script -> options of argparse's add_argument.
Actions = Mapping[str, Mapping[str, Any]]
# Those of all scripts, besides the fields.
GENERAL: Actions = {
    "--config": {
        "metavar": "FILE",
        "help": "take the fields of a saved config, such as "
        "checkpoints/<run>/config.json, except for paths; flags override them",
    },
    "--help-all": {"action": "help", "help": "show the other fields too"},
    "--version": {
        "action": "version",
        "version": f"image-captioning {VERSION}",
        "help": "show the version",
    },
}


class Arguments(NamedTuple):
    """A parsed command line."""

    config: Config
    given: dict[str, Any]  # the fields of Config that were given as flags
    actions: argparse.Namespace
    saved: dict[str, Any]  # the fields of --config


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        tell(message)
        raise SystemExit(WRONG_USAGE)


def tell(text: str) -> None:
    """Prints an error as one line, whatever file names it quotes."""
    line = "".join(c if c.isprintable() else " " for c in text)
    print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)


def _parser(description: str, actions: Actions, everything: bool) -> _Parser:
    """The parser of a script.

    Args:
        description: what the script does.
        actions: the flags that only this script has.
        everything: whether its help is to show all fields.
    """
    script = os.path.basename(sys.argv[0])
    inputs = [f"[{actions[x]['metavar']} ...]" for x in actions if x[0] != "-"]
    parser = _Parser(
        usage=" ".join(["python", script, "[options]", *inputs]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, options in {**actions, **GENERAL}.items():
        parser.add_argument(name, **options)
    groups = {x: parser.add_argument_group(f"{x} fields") for x in GROUPS}
    for field in FIELDS.values():
        shown = everything or _matters(field, script)
        its_group = groups[field.metadata["group"]]
        its_group.add_argument(flag(field.name), **_options(field, shown))
    return parser


def _matters(field: dataclasses.Field, script: str) -> bool:
    """Whether --help of a script shows a field."""
    if script not in FIELDS_OF:
        return True
    if OF_ONE.get(field.name, script) != script:
        return False
    return field.name in NAMING or field.metadata["group"] in FIELDS_OF[script]


def _options(field: dataclasses.Field, shown: bool) -> dict[str, Any]:
    """How argparse reads a field, and what --help says of it if shown."""
    text, choices = field.metadata["help"], field.metadata["choices"]
    if choices:
        text += f": {', '.join(choices)}"
    if field.default != "":
        drawn = field.metadata["sample"]
        other = f"; {drawn} for the sample" if drawn is not None else ""
        text += f" (default: {field.default}{other})"
    kind: Any = field.type
    called = "NAME" if choices else kind.__name__.upper()
    reading = {"type": kind, "metavar": called}
    if kind is bool:
        reading = {"action": argparse.BooleanOptionalAction}
    return {
        **reading,
        "default": argparse.SUPPRESS,  # what is not given is absent
        "help": text.replace("%", "%%") if shown else argparse.SUPPRESS,
    }


def _unknown(word: str, actions: Actions) -> str:
    """What to say of a word that the parser does not know."""
    if not word.startswith("-"):
        return f"unknown argument {word}; see --help"
    word = word.split("=")[0]
    for instead, names in ELSEWHERE.items():
        if word.replace("_", "-") in names.split():
            return f"unknown flag {word}; {instead}"
    known = ["--help", *actions, *GENERAL, *map(flag, FIELDS)]
    flags = [name for name in known if name[0] == "-"]
    return f"unknown flag {word}{did_you_mean(word, flags)}"


def _read_config(path: str) -> dict[str, Any]:
    """The fields of a saved config, except for places.

    Raises:
        UserError: if it is not a config, or has unknown fields.
    """
    try:
        with open(path, encoding="utf-8") as file:
            fields = dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--config {path} cannot be read: {reason}") from None
    unknown = sorted(fields.keys() - FIELDS.keys())
    if unknown:
        raise UserError(
            f"--config {path} is from another version, with "
            f"{' and '.join(unknown)}: remove these fields"
        )
    return {k: x for k, x in fields.items() if k not in group("place")}


def parse(
    description: str, actions: Actions, arguments: Sequence[str] | None = None
) -> Arguments:
    """Parses the command line; ends the process if it is wrong.

    Args:
        description: what the script does, for --help.
        actions: the flags that only this script has.
        arguments: the command line; None takes it from sys.argv.

    Returns:
        The config with its open choices resolved, the fields that were given,
        and the actions.
    """
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    parser = _parser(description, actions, "--help-all" in words)
    if "--" in words:  # argparse would still look for flags behind it
        place = words.index("--")
        words[place:] = [
            f"./{word}" if word.startswith("-") and word != "-" else word
            for word in words[place + 1 :]
        ]
    try:
        # Intermixed: photographs may stand before and after flags.
        known, unknown = parser.parse_known_intermixed_args(words)
        if unknown:
            raise UserError(_unknown(unknown[0], actions))
        saved = _read_config(known.config) if known.config else {}
        given = saved | {k: v for k, v in vars(known).items() if k in FIELDS}
        if isinstance(given.get("split"), str):
            given["split"] = SPLIT_SYNONYMS.get(given["split"], given["split"])
        config = resolve(Config(**given), given)
    except UserError as error:
        parser.error(str(error))
    return Arguments(config, given, known, saved)


def import_keras() -> None:
    """Imports Keras without TensorFlow's messages about its build.

    It reports instruction sets and missing GPUs on standard error, from C++
    and before its own switch for that (TF_CPP_MIN_LOG_LEVEL) takes effect, and
    later what it traces more than once; a user can do nothing about any of it.

    Raises:
        UserError: if the backend cannot be imported, or is not supported.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    # TensorFlow and JAX take GPU memory as they need it, and not all of it.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    _keep_freed_memory()
    try:
        with streams.silent_errors():
            import keras
    except ImportError as error:
        raise UserError(
            f"Keras or its backend cannot be imported ({error}): run pip "
            f"install -r requirements.txt, and {CHOOSE_BACKEND}"
        ) from None
    _check_backend(keras.config.backend())


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise UserError(
            f"Keras's backend {name} is not supported: {CHOOSE_BACKEND}"
        )


def _keep_freed_memory() -> None:
    """Makes glibc keep the memory that one step frees for the next.

    By default it returns large blocks to the system and gets them back page
    by page, each page zeroed: a third of the time of a training step.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    # A second arena would not share what it keeps with the first.
    mallopt(M_ARENA_MAX, 1)


def _repeat(hook: Callable[[Any], Any], found: Any) -> None:
    """Repeats an interruption that came where Python has to ignore it.

    JAX, which Keras imports on TensorFlow too, has a callback that runs with
    every garbage collection: what is raised there is lost.

    Args:
        hook: what to do with all other exceptions.
        found: what `sys.unraisablehook` gets.
    """
    if found.exc_type is not KeyboardInterrupt:
        hook(found)
        return
    again = functools.partial(signal.raise_signal, signal.SIGTERM)
    if os.name != "nt":  # a true signal also ends a system call that waits
        main = threading.main_thread().ident or 0
        again = functools.partial(signal.pthread_kill, main, signal.SIGTERM)
    soon = threading.Timer(0.05, again)
    soon.daemon = True
    soon.start()


def run(
    main: Callable[[Arguments], int | None],
    description: str,
    actions: Actions,
    end_with_reader: bool = False,
) -> NoReturn:
    """Runs a script's main with the exit codes that all scripts share.

    0 done; 1 something in the data or the run is wrong, told in one line;
    2 wrong usage; 130 interrupted.

    Args:
        main: the script; it may return an exit code of its own.
        description: the script's docstring.
        actions: the flags that only this script has.
        end_with_reader: whether its job is to print, so that it may end once
            nobody is reading. A script that writes files carries on.
    """
    streams.prepare(end_with_reader)
    arguments = parse(description, actions)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.unraisablehook = functools.partial(_repeat, sys.unraisablehook)
    try:
        # Before any work: Keras is imported late.
        _check_backend(os.environ.get("KERAS_BACKEND") or BACKENDS[0])
        code = main(arguments) or DONE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        tell("interrupted; run the same command again to continue")
        code = INTERRUPTED
    except Exception as error:
        told = _explain(error)
        if told is None:
            raise
        tell(told)
        code = FAILED
    if code and job.described():
        # At an orderly exit JAX would wait for processes that may be lost.
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _explain(error: Exception) -> str | None:
    """What to say of an error that a user can put right; None for others."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        reason = f"{where}{error.strerror or error}"
        if error.errno == errno.ENOSPC:
            reason += ": free some space and run it again; nothing is lost"
        return reason
    said = f"{type(error).__name__}: {error}"  # by TensorFlow or JAX
    exhausted = "RESOURCE_EXHAUSTED" in said or "ResourceExhausted" in said
    if exhausted or isinstance(error, MemoryError):
        return (
            "out of memory: give a lower --batch-images, --beam-size or "
            "--magnification, or end other programs"
        )
    return None


def next_line(script: str, arguments: Arguments) -> str:
    """The command to run next, with those flags of this one that it needs.

    Args:
        script: the file name of the next script.
        arguments: of this script.
    """
    words = ["python", script]
    names = [*group("place"), *group("data"), *group("encoder")]
    if arguments.saved:  # all of it counts as given
        words += ["--config", shlex.quote(arguments.actions.config)]
        names += group("model")
    elif script == "caption.py":  # which knows the data by the run
        names = [*group("place"), "dataset", *group("encoder")]
    for name in names:
        value = arguments.given.get(name)
        if value != arguments.saved.get(name):
            words += [flag(name), shlex.quote(str(value))]
    return " ".join(words)
