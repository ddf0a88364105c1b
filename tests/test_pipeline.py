"""The whole job on a small sample: its files, its scores, its captions."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from captioning.backend import TENSORFLOW
from captioning.data.sample import write_sample
from tests.benchmarks.blind import exchange_images
from tests.scripts import bad, good, run

# Small and quick, and still enough to see the image.
SMALL = (
    "--encoder scenes --magnification 1 "
    "--min-word-count 2 --max-caption-length 12"
).split()
TRAINING = (
    # One measurement: CIDEr of 30 validation images would choose by chance.
    "--epochs 8 --cider-every 8 --batch-images 8 "
    "--decoder-units 64 --attention-units 64 "
    "--embedding-units 64 --learning-rate 0.004"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a preprocessed small sample and a run, evaluated."""
    folder = tmp_path_factory.mktemp("home")
    write_sample(folder / "data" / "small", images=360)
    for script, flags, told in (
        ("preprocess.py", [], "Next: python train.py --dataset small"),
        ("train.py", TRAINING, "Next: python evaluate.py --dataset small"),
        ("evaluate.py", [], "Next: python caption.py"),
    ):
        assert told in good(script, *FLAGS, *flags, folder=folder)
    return folder


FLAGS = ["--dataset", "small", *SMALL]
RUN = Path("checkpoints") / "small-scenes"
METRICS = Path("evaluation") / "test" / "metrics.json"


def test_the_pipeline_leaves_the_files_of_the_contract(home):
    (cache,) = (home / "data" / "cache").glob("[!.]*")
    assert cache.name == "small"
    (text,) = cache.glob("text-*")
    for name in ("captions.csv", "vocabulary.json", "skipped.csv"):
        assert (text / name).stat().st_size
    (features,) = cache.glob("features/*/features.npy")
    array = np.load(features, mmap_mode="r")
    assert array.dtype == np.float16 and array.shape == (360, 49, 256)
    assert json.loads((features.parent / "meta.json").read_text())["weights"]
    table = pd.read_csv(features.parent / "images.csv")
    assert list(table) == ["image", "size", "modified"] and len(table) == 360
    run_folder = home / RUN
    for name in (
        "config.json",
        "vocabulary.json",
        "model.weights.h5",
        "history.csv",
        "curves.png",
    ):
        assert (run_folder / name).stat().st_size
    # On JAX it has to be asked for.
    assert any((run_folder / "tensorboard").rglob("events*")) == TENSORFLOW
    place = run_folder / "evaluation" / "test"
    metrics = json.loads((place / "metrics.json").read_text())
    captions = json.loads((place / "captions.json").read_text())
    assert metrics["split"] == "test" and metrics["images"] == len(captions)
    assert all(entry["caption"] for entry in captions)
    names = (
        "beam_size tokenizer token_accuracy token_accuracy_top5 perplexity "
        "bleu1 bleu2 bleu3 bleu4 meteor rouge_l cider spice distinct_captions "
        "novel_captions vocabulary_used mean_length images_per_second "
        "intervals unavailable run"
    )
    for name in names.split():
        assert name in metrics
        if metrics[name] is None:
            assert metrics["unavailable"][name]
    for name, (low, high) in metrics["intervals"].items():
        assert low < metrics[name] < high
    assert {*metrics["intervals"]} == {"token_accuracy", "bleu4", "cider"}
    assert 0 < metrics["token_accuracy"] < metrics["token_accuracy_top5"] <= 1
    table = pd.read_csv(place / "captions.csv")
    assert table["cider"].mean() == pytest.approx(metrics["cider"])
    assert (place / "report.html").stat().st_size > 10_000
    assert list((place / "attention").glob("*.png"))
    hidden = [p for p in home.rglob(".*") if p.suffix != ".lock"]
    assert not hidden, "temporary files are left"


def test_a_run_looks_at_the_image_that_it_captions(home):
    """Of other images, what it says is less true."""
    (cache,) = (home / "data" / "cache").glob("[!.]*")
    exchange_images(cache, home / "blind" / "cache" / cache.name)
    shutil.copytree(home / RUN, home / "checkpoints" / "blind")
    flags = ["--data-dir", "blind", "--run-name", "blind"]
    good("evaluate.py", *FLAGS, *flags, folder=home)
    sees, blind = (
        json.loads((home / "checkpoints" / name / METRICS).read_text())
        for name in (RUN.name, "blind")
    )
    assert sees["cider"] > blind["cider"]
    assert sees["perplexity"] < 0.9 * blind["perplexity"]


def test_photographs_are_captioned_from_the_run_folder_alone(home, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a b.jpg", "a b.png", "é.png"):
        source = home / "data" / "small" / "images" / "scene_00000.jpg"
        pixels = cv2.imread(str(source))
        ending = Path(name).suffix
        (photos / name).write_bytes(cv2.imencode(ending, pixels)[1].tobytes())
    # Repaired, they are captioned like any other.
    image = Image.fromarray(pixels[..., ::-1])
    image.getexif()[274] = 6
    image.save(photos / "turned.jpg", exif=image.getexif())
    image.convert("L").save(photos / "grey.jpg")
    (photos / "broken.jpg").write_bytes(b"no image")
    flags = ["--checkpoints-dir", home / "checkpoints"]
    flags += ["--run-name", RUN.name]
    names = {"a b.jpg", "a b.png", "é.png", "turned.jpg", "grey.jpg"}
    for more in ([], ["--attention", tmp_path / "maps"]):
        done = run("caption.py", photos, *flags, *more, folder=tmp_path)
        assert done.returncode == 1
        lines = dict(line.split("\t") for line in done.stdout.splitlines())
        assert set(lines) == {str(photos / name) for name in names}
        assert all(lines.values())
        assert "broken.jpg: not an image" in done.stderr
        assert "Captioned 5 of 6 photographs" in done.stderr
    # Two photographs that differ in their ending alone have a figure each.
    assert len(list((tmp_path / "maps").glob("*.png"))) == 5
    listed = f"{photos / 'a b.jpg'}\n"
    done = run(
        "caption.py", "-", "--json", *flags, folder=tmp_path, stdin=listed
    )
    entry = json.loads(done.stdout)
    assert done.returncode == 0
    assert entry["caption"].split() == [w["word"] for w in entry["words"]]
    n_best = entry["n_best"]
    assert len({each["caption"] for each in n_best}) == len(n_best) == 20
    assert n_best[0]["caption"] == entry["caption"]
    assert n_best[0]["score"] == entry["score"]
    assert n_best[0]["log_probability"] == entry["log_probability"] < 0
    agreement = [each["agreement"] for each in n_best]
    assert agreement == sorted(agreement, reverse=True)
    assert entry["attention_grid"] == [7, 7]
    assert {len(each["attention"]) for each in entry["words"]} == {49}
    assert all(0 < each["probability"] <= 1 for each in entry["words"])


def test_what_shapes_a_run_cannot_change(home):
    line = bad("train.py", *FLAGS, *TRAINING, "--seed", "1", folder=home)
    assert "seed is 0" in line and "--fresh" in line
    # An old run is set aside when nothing is missing for the new one.
    flags = [*FLAGS, *TRAINING, "--fresh", "--magnification", "2"]
    assert "no features" in bad("train.py", *flags, folder=home)
    assert (home / RUN / "config.json").exists()
