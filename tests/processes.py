"""Helpers for tests that run preprocess.py with a tiny encoder."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

import preprocess
from captioning import command
from tests.tiny_preprocess import use_tiny_encoder

SCRIPT = Path(__file__).parent / "tiny_preprocess.py"


def start(
    folder: Path, *flags: str, pause: float = 0, dataset: str = "photos"
) -> subprocess.Popen:
    """Starts preprocess.py, with a tiny encoder, on data/photos."""
    named = ["--dataset", dataset] if dataset else []
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *named, *flags],
        cwd=folder,
        env={**os.environ, "PAUSE": str(pause)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *flags: str, dataset: str = "photos"):
    """The same in this process, to the end; gives what `end` gives."""
    named = ["--dataset", dataset] if dataset else []
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["preprocess.py", *named, *flags])
        use_tiny_encoder(patch)
        command.run(preprocess.main, preprocess.__doc__, preprocess.ACTIONS)
    signal.signal(signal.SIGTERM, handler)
    return ended.value.code, out.getvalue(), err.getvalue()


def good(folder: Path, *flags: str, **options) -> str:
    """Runs preprocess.py, which has to succeed; gives what it printed."""
    code, out, err = run(folder, *flags, **options)
    assert code == 0, err
    return out + err


def bad(folder: Path, *flags: str, **options) -> str:
    """Runs preprocess.py, which has to fail in one line; gives that line.

    Above it there may be the bars of what was done before.
    """
    code, _, err = run(folder, *flags, **options)
    *bars, line = err.removesuffix("\n").split("\n")
    assert code == 1 and all(each[:1] == "\r" for each in bars), err
    return line


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits; gives the exit code, what was printed and the errors."""
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def make_photos(folder: Path, number: int = 120) -> None:
    """Images of noise; one is broken and one has alpha."""
    images = folder / "data" / "photos" / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = []
    for place in range(number):
        name = f"{place:03d}.png"
        channels = 4 if place == 7 else 3
        pixels = generator.integers(0, 256, (32, 32, channels), np.uint8)
        (images / name).write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        split = "val" if place % 5 == 0 else "train"
        rows.append((name, f"a picture of number {place}", split))
    (images / "041.png").write_bytes(b"no picture")
    (images / "100.png").write_bytes((images / "003.png").read_bytes())
    table = pd.DataFrame(rows, columns=["image", "caption", "split"])
    table.to_csv(images.parent / "captions.csv", index=False)
