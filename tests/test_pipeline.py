"""The scripts as processes, as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from captioning.sample import write_sample
from tests.benchmarks.blind import exchange_images

ROOT = Path(__file__).parent.parent

# Small and quick, and still enough to see the image.
SMALL = [
    *("--encoder", "resnet50", "--image-size", "96"),
    *("--min-word-count", "2"),
]
TRAINING = [
    *("--epochs", "12", "--cider-every", "6", "--batch-images", "8"),
    *("--decoder-units", "64", "--attention-units", "64"),
    *("--embedding-units", "64", "--learning-rate", "0.004"),
]


def run(script: str, *flags, folder: Path, env=None, stdin=None):
    """Runs a script in a folder of its own; gives the finished process."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=folder,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **(env or {})},
        input=stdin,
        capture_output=True,
        text=True,
    )


def good(*arguments, **options) -> str:
    """Runs a script that has to succeed; gives what it printed."""
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def bad(*arguments, code=1, **options) -> str:
    """Runs a script that has to fail in one line; gives that line."""
    done = run(*arguments, **options)
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    lines = [
        each
        for each in done.stderr.strip().splitlines()
        if not each.startswith("Note: ")
    ]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a preprocessed small sample and a trained run."""
    folder = tmp_path_factory.mktemp("home")
    write_sample(folder / "data" / "small", images=360)
    flags = ["--dataset", "small", "--encoder-weights", "random", *SMALL]
    printed = good("preprocess.py", *flags, folder=folder)
    assert "Next: python train.py --dataset small" in printed
    printed = good("train.py", *flags, *TRAINING, folder=folder)
    assert "Next: python evaluate.py --dataset small" in printed
    return folder


FLAGS = ["--dataset", "small", "--encoder-weights", "random", *SMALL]
RUN = Path("checkpoints") / "small-resnet50"


def test_the_pipeline_leaves_the_files_of_the_contract(home):
    printed = good("evaluate.py", *FLAGS, folder=home)
    assert "CIDEr" in printed and "Next: python caption.py" in printed
    # A lock file lies beside it.
    (cache,) = (home / "data" / "cache").glob("[!.]*")
    assert cache.name.startswith("small-")
    for name in ("captions.csv", "vocabulary.json", "skipped.csv"):
        assert (cache / name).stat().st_size
    (features,) = cache.glob("*/features.npy")
    array = np.load(features, mmap_mode="r")
    assert array.dtype == np.float16 and array.shape == (360, 9, 2048)
    assert json.loads((features.parent / "meta.json").read_text())["weights"]
    assert len(pd.read_csv(features.parent / "images.csv")) == 360
    run_folder = home / RUN
    for name in (
        "config.json",
        "vocabulary.json",
        "model.weights.h5",
        "history.csv",
        "curves.png",
    ):
        assert (run_folder / name).stat().st_size
    assert any((run_folder / "tensorboard").rglob("events*"))
    place = run_folder / "evaluation" / "test"
    metrics = json.loads((place / "metrics.json").read_text())
    captions = json.loads((place / "captions.json").read_text())
    assert metrics["split"] == "test" and metrics["images"] == len(captions)
    assert all(entry["caption"] for entry in captions)
    for name in (
        *("beam_size", "tokenizer", "token_accuracy", "token_accuracy_top5"),
        *("perplexity", "bleu1", "bleu2", "bleu3", "bleu4", "meteor"),
        *("rouge_l", "cider", "spice", "distinct_captions"),
        *("novel_captions", "vocabulary_used", "mean_length"),
        *("images_per_second", "intervals", "unavailable"),
    ):
        assert name in metrics
        if metrics[name] is None:
            assert metrics["unavailable"][name]
    assert 0 < metrics["token_accuracy"] < metrics["token_accuracy_top5"] <= 1
    table = pd.read_csv(place / "captions.csv")
    assert table["cider"].mean() == pytest.approx(metrics["cider"])
    assert (place / "report.html").stat().st_size > 10_000
    assert list((place / "attention").glob("*.png"))
    hidden = [p for p in home.rglob(".*") if p.suffix != ".lock"]
    assert not hidden, "temporary files are left"


def test_a_model_that_sees_beats_one_that_does_not(home):
    (cache,) = (home / "data" / "cache").glob("[!.]*")
    blind = home / "blind"
    exchange_images(cache, blind / "cache" / cache.name)
    scores = []
    for flags in ([], ["--data-dir", "blind", "--run-name", "blind"]):
        if flags:
            good("train.py", *FLAGS, *TRAINING, *flags, folder=home)
        good("evaluate.py", *FLAGS, *flags, folder=home)
        name = "blind" if flags else RUN.name
        path = home / "checkpoints" / name / "evaluation" / "test"
        scores.append(json.loads((path / "metrics.json").read_text())["cider"])
    assert scores[0] > 1.3 * scores[1]


def test_scores_can_be_had_again_from_the_captions(home):
    good("evaluate.py", *FLAGS, folder=home)
    place = home / RUN / "evaluation" / "test"
    first = json.loads((place / "metrics.json").read_text())
    flags = ["--captions", place / "captions.json"]
    good("evaluate.py", *FLAGS, *flags, folder=home)
    again = json.loads((place / "metrics.json").read_text())
    assert again["cider"] == first["cider"]
    assert again["token_accuracy"] is None
    assert again["unavailable"]["token_accuracy"]


def test_runs_are_averaged(home):
    """A run with itself is the run; runs may differ in their encoder."""
    other = ["--encoder", "mobilenetv2", "--run-name", "other"]
    short = [*TRAINING, "--epochs", "2"]
    weights = ["--encoder-weights", "random"]
    good("preprocess.py", *FLAGS, *other[:2], folder=home)
    good("train.py", *FLAGS, *short, *other, folder=home)
    flags = ["--dataset", "small", *weights, "--min-word-count", "2"]
    flags += ["--limit-images", "10"]
    found = {}
    for names in ([RUN.name], [RUN.name] * 2, [RUN.name, "other"]):
        printed = good("evaluate.py", "--runs", *names, *flags, folder=home)
        place = home / "checkpoints" / "+".join(names) / "evaluation" / "test"
        assert str(place.relative_to(home)) in printed
        found[len(found)] = (
            json.loads((place / "metrics.json").read_text()),
            json.loads((place / "captions.json").read_text()),
        )
    alone, twice, both = (found[n] for n in range(3))
    assert alone[1] == twice[1]
    assert alone[0]["perplexity"] == pytest.approx(twice[0]["perplexity"], 1e-3)
    assert alone[1] != both[1]
    assert abs(alone[0]["perplexity"] / both[0]["perplexity"] - 1) > 0.01


def test_runs_of_two_vocabularies_are_not_averaged(home):
    words = home / "checkpoints" / "stranger"
    shutil.copytree(home / RUN, words)
    path = words / "vocabulary.json"
    known = json.loads(path.read_text(encoding="utf-8"))["words"]
    known[4:] = known[:3:-1]
    path.write_text(json.dumps({"words": known}), encoding="utf-8")
    flags = ["--runs", RUN.name, "stranger"]
    done = run("evaluate.py", *FLAGS, *flags, folder=home)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "vocabulary" in line and "stranger" in line
    flags = ["--runs", RUN.name, "--run-name", RUN.name]
    assert "--run-name" in bad("evaluate.py", *FLAGS, *flags, folder=home)


def test_photographs_are_captioned_from_the_run_folder_alone(home, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a b.jpg", "é.png"):
        source = home / "data" / "small" / "images" / "scene_00000.jpg"
        pixels = cv2.imread(str(source))
        ending = Path(name).suffix
        (photos / name).write_bytes(cv2.imencode(ending, pixels)[1].tobytes())
    (photos / "broken.jpg").write_bytes(b"no image")
    flags = [
        *("--checkpoints-dir", home / "checkpoints"),
        *("--run-name", RUN.name, "--encoder-weights", "random"),
    ]
    done = run(
        *("caption.py", photos, *flags, "--attention", tmp_path / "maps"),
        folder=tmp_path,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = dict(line.split("\t") for line in done.stdout.splitlines())
    assert set(lines) == {str(photos / "a b.jpg"), str(photos / "é.png")}
    assert all(lines.values())
    assert "broken.jpg: not an image" in done.stderr
    assert len(list((tmp_path / "maps").glob("*.png"))) == 2
    done = run(
        *("caption.py", "-", "--json", *flags),
        folder=tmp_path,
        stdin=f"{photos / 'a b.jpg'}\n",
    )
    entry = json.loads(done.stdout)
    assert done.returncode == 0
    assert entry["caption"].split() == [w["word"] for w in entry["words"]]
    n_best = entry["n_best"]
    assert len({each["caption"] for each in n_best}) == len(n_best) == 5
    assert n_best[0]["caption"] == entry["caption"]
    assert n_best[0]["score"] >= n_best[1]["score"]
    assert n_best[0]["log_probability"] == entry["log_probability"] < 0


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(home):
    """Killed after its first saved point, given again, equal bit for bit."""
    flags = [*FLAGS, *TRAINING, "--epochs", "2", "--cider-every", "2"]
    good("train.py", *flags, "--run-name", "whole", folder=home)
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    process = subprocess.Popen(
        [*command, "--run-name", "killed"],
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    killed = home / "checkpoints" / "killed"
    while not (killed / "last" / "state.npz").exists():
        assert process.poll() is None, "the run ended without a saved point"
    process.kill()
    process.wait()
    good("train.py", *flags, "--run-name", "killed", folder=home)
    whole = home / "checkpoints" / "whole"
    columns = ["loss", "val_loss", "val_token_accuracy", "val_cider"]
    one, other = (
        pd.read_csv(each / "history.csv")[columns] for each in (whole, killed)
    )
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    one, other = (np.load(f / "last" / "state.npz") for f in (whole, killed))
    for name in set(one.files) - {"progress"}:
        np.testing.assert_array_equal(one[name], other[name])


def test_what_shapes_a_run_cannot_change(home):
    line = bad("train.py", *FLAGS, "--learning-rate", "0.1", folder=home)
    assert "learning_rate" in line or "batch_images" in line
    assert "--fresh" in line and "--run-name" in line
    line = bad("evaluate.py", *FLAGS, "--decoder-units", "99", folder=home)
    assert "decoder_units is 64" in line


@pytest.mark.parametrize(
    ("script", "flags", "told"),
    [
        ("preprocess.py", ["--dataset", "nothing"], "data/nothing"),
        ("train.py", [], "preprocess.py"),
        ("evaluate.py", [], "train.py"),
        ("caption.py", ["x.jpg"], "x.jpg"),
        ("preprocess.py", ["--encoder-weights", "w.h5"], "w.h5"),
    ],
)
def test_what_is_missing_is_told_in_one_line(tmp_path, script, flags, told):
    done = run(script, *flags, folder=tmp_path)
    assert done.returncode == 1
    assert told in done.stderr.replace("\\", "/")
    assert "Traceback" not in done.stderr


def test_a_split_that_is_not_there_is_told_in_one_line(tmp_path):
    data = tmp_path / "data" / "two"
    write_sample(data, images=30)
    table = pd.read_csv(data / "captions.csv")
    table[table["split"] != "test"].to_csv(data / "captions.csv", index=False)
    flags = ["--dataset", "two", "--encoder", "mobilenetv2"]
    flags += ["--image-size", "32", "--encoder-weights", "random"]
    small = ["--decoder-units", "8", "--epochs", "1", "--attention-units", "8"]
    good("preprocess.py", *flags, folder=tmp_path)
    good("train.py", *flags, *small, folder=tmp_path)
    line = bad("evaluate.py", *flags, folder=tmp_path)
    assert "no split test" in line and "--split val" in line
    good("evaluate.py", *flags, "--split", "dev", folder=tmp_path)
    table[table["split"] == "test"].to_csv(data / "captions.csv", index=False)
    line = bad("preprocess.py", *flags, folder=tmp_path)
    assert "split train" in line


def test_weights_that_cannot_be_downloaded_are_told_in_one_line(tmp_path):
    write_sample(tmp_path / "data" / "few", images=10)
    flags = ["--dataset", "few", "--image-size", "32"]
    # A cache of Keras that is empty, and no way out to the network.
    env = {
        "KERAS_HOME": str(tmp_path / "keras"),
        "HOME": str(tmp_path),
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    done = run("preprocess.py", *flags, folder=tmp_path, env=env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--encoder-weights" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "data").rglob("captions.csv"))[1:]


@pytest.mark.real_data
def test_the_real_encoder_tells_photographs_apart(real_data, tmp_path):
    """Trained ResNet50: two crops of a photograph are alike, others not."""
    from captioning.images import read_image
    from config import Config
    from model import build_encoder

    weights = real_data / "weights" / "resnet50_notop.weights.h5"
    encoder = build_encoder(Config(), str(weights))
    folder = real_data / "data" / "flickr8k" / "Images"
    paths = sorted(folder.iterdir())[:4]
    pixels = np.stack([read_image(path, 224)[0] for path in paths])
    mirrored = pixels[:, :, ::-1]
    found = [
        np.asarray(encoder.predict_on_batch(each), np.float32).mean(1)
        for each in (pixels, np.ascontiguousarray(mirrored))
    ]
    one, other = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in found)
    likeness = one @ other.T  # (photographs, mirrored photographs)
    assert (likeness.argmax(1) == np.arange(4)).all()
    assert likeness.diagonal().min() > 0.8
