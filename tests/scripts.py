"""Runs the scripts as a user does, as processes or in this process.

In this process each of them is spared the seconds that TensorFlow takes to
start. No Java is found either way: METEOR takes it ten seconds, and what it
gives is tested with the metrics.
"""

import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import keras
import pytest

from captioning import command

ROOT = Path(__file__).parent.parent


def process(script: str, *flags, folder: Path) -> subprocess.Popen:
    """Starts a script in a folder of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=folder,
        env={**os.environ, "PATH": str(Path(sys.executable).parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str, *flags, folder: Path, stdin: str = ""):
    """Runs a script in a folder of its own; gives its code and its output."""
    module = importlib.import_module(script.removesuffix(".py"))
    out, err = io.StringIO(), io.StringIO()
    handlers = {
        each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)
    }
    policy = keras.config.dtype_policy()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [script, *map(str, flags)]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        mock.patch.object(shutil, "which", return_value=None),
        # This process lives on: the next script would be interrupted.
        mock.patch.object(command, "_repeat"),
        mock.patch.object(sys, "unraisablehook", sys.unraisablehook),
        pytest.raises(SystemExit) as ended,
    ):
        command.run(module.main, module.__doc__, module.ACTIONS)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    keras.config.set_dtype_policy(policy)
    return SimpleNamespace(
        returncode=ended.value.code,
        stdout=out.getvalue(),
        stderr=err.getvalue(),
    )


def good(*arguments, **options) -> str:
    """Runs a script that has to succeed; gives what it printed."""
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def bad(*arguments, **options) -> str:
    """Runs a script that has to fail in one line; gives that line."""
    done = run(*arguments, **options)
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    lines = [
        each
        for each in done.stderr.strip().splitlines()
        if not each.startswith("Note: ")
    ]
    assert len(lines) == 1, done.stderr
    return lines[0]
