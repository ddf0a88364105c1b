"""What the scripts do beside the main job, with tiny models."""

import json
import os
import re
import shutil
import signal
import urllib.request
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from captioning import runs
from captioning.data.sample import write_sample
from captioning.features import extraction
from captioning.scoring import metrics, results
from config import Config, UserError
from tests.scripts import bad, good, process, run

DATA = ["--dataset", "tiny", "--image-size", "64"]
DATA += ["--encoder-weights", "random", "--max-caption-length", "5"]
FLAGS = [*DATA, "--encoder", "scenes"]
TRAINING = ["--epochs", "2", "--cider-every", "2", "--batch-images", "4"]
for name in ("decoder", "attention", "embedding"):
    TRAINING += [f"--{name}-units", "8"]
RUN = "tiny-scenes"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with an evaluated run on a tiny sample without a test split."""
    folder = tmp_path_factory.mktemp("home")
    data = folder / "data" / "tiny"
    write_sample(data, images=30)
    table = pd.read_csv(data / "captions.csv")
    table[table["split"] != "test"].to_csv(data / "captions.csv", index=False)
    good("preprocess.py", *FLAGS, folder=folder)
    good("train.py", *FLAGS, *TRAINING, folder=folder)
    good("evaluate.py", *FLAGS, "--split", "val", folder=folder)
    return folder


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Drawing them takes longer than an epoch; test_pipeline looks at them."""
    from captioning.training import callbacks

    monkeypatch.setattr(callbacks, "write_curves", lambda *_: None)


def interrupt(epoch: int, batch: int, *flags, folder: Path) -> None:
    """Ends train.py at a saved point: after a batch of an epoch, from 0."""
    from captioning.training import callbacks

    save = callbacks.SavePoints.save

    def save_and_end(points):
        save(points)
        if (points.epoch, points.batch) == (epoch, batch):
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "SAVE_SECONDS", 0)
        patch.setattr(callbacks.SavePoints, "save", save_and_end)
        done = run("train.py", *flags, folder=folder)
    assert done.returncode == 130 and "Saving" in done.stdout


def evaluation(home: Path, run: str, name: str) -> dict:
    """The metrics of an evaluation."""
    place = home / "checkpoints" / run / "evaluation" / name
    return json.loads((place / "metrics.json").read_text())


def assert_same_run(home: Path, *names: str) -> None:
    """The same history, state and best weights, bit for bit."""
    places = [home / "checkpoints" / each for each in names]
    one, other = (
        pd.read_csv(f / "history.csv").drop(columns="seconds") for f in places
    )
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    one, other = (np.load(f / "last" / "state.npz") for f in places)
    assert one.files == other.files
    for name in set(one.files) - {"progress"}:
        np.testing.assert_array_equal(one[name], other[name])
    one, other = (json.loads(str(each["progress"])) for each in (one, other))
    for name in set(one) - {"seconds", "history"}:
        assert one[name] == other[name]
    one, other = (arrays(f / "model.weights.h5") for f in places)
    assert one.keys() == other.keys() and len(one) > 10
    # Not the optimizer's, which are three times as many.
    assert not any("optimizer" in name for name in one)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


def arrays(path: Path) -> dict[str, np.ndarray]:
    """All that a weights file has, the number of the epoch included."""
    found = {}

    def add(name, each):
        if isinstance(each, h5py.Dataset):
            found[name] = each[()]

    with h5py.File(path) as file:
        file.visititems(add)
        found["epoch"] = file.attrs["epoch"]
    return found


def test_runs_are_averaged(home):
    """A run with itself is the run; runs may differ in their encoder."""
    other = [*DATA, "--encoder", "vgg16"]
    good("preprocess.py", *other, folder=home)
    flags = [*TRAINING, "--learning-rate", "0.01", "--run-name", "other"]
    good("train.py", *other, *flags, folder=home)
    found = []
    for names in ([RUN], [RUN, RUN], [RUN, "other"]):
        flags = [*DATA, "--split", "val", "--runs", *names]
        printed = good("evaluate.py", *flags, folder=home)
        place = Path("checkpoints") / "+".join(names) / "evaluation" / "val"
        assert str(place) in printed
        assert f" --run-name {RUN} PHOTO" in printed
        captions = json.loads((home / place / "captions.json").read_text())
        metrics = evaluation(home, "+".join(names), "val")
        found.append((captions, metrics["perplexity"]))
    assert metrics["run"]["run"] == f"{RUN}+other"
    assert metrics["run"]["encoder"] == ["scenes", "vgg16"]
    assert metrics["run"]["epoch"] == [2, 2]
    alone, twice, both = found
    assert alone[0] == twice[0]
    assert alone[1] == pytest.approx(twice[1], 1e-3)
    assert abs(alone[1] / both[1] - 1) > 0.01


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM")
def test_a_killed_run_ends_as_if_it_had_not_been(home, monkeypatch):
    """With more epochs than before; killed and then terminated.

    The rate does not jump up, and the screen says what it does.
    """
    flags = [*FLAGS, *TRAINING, "--epochs", "4", "--run-name"]
    trained, cut, half = (
        home / "checkpoints" / each for each in (RUN, "cut", "half")
    )
    for place in (cut, cut.with_name("longer")):
        shutil.copytree(trained, place)
    printed = good("train.py", *flags, "longer", folder=home)
    assert "keeps the schedule of 2 epochs" in printed
    started = process("train.py", *flags, "cut", folder=home)
    while runs.load_progress(cut)["epoch"] == 2:
        assert started.poll() is None, started.stderr.read()
    started.kill()
    _, errors = started.communicate()
    assert "Traceback" not in errors
    interrupt(3, 2, *flags, "cut", folder=home)
    shutil.copytree(cut, half)
    printed = good("train.py", *flags, "cut", folder=home)
    assert "Resuming in epoch 4, after step 2" in printed
    assert_same_run(home, "longer", "cut")
    rates = pd.read_csv(cut / "history.csv")["learning_rate"]
    assert rates[1] == pytest.approx(0, abs=1e-9)
    assert 0 < rates[2] == rates[3] < 0.6e-3
    assert "raise --epochs" in good("train.py", *flags, "cut", folder=home)
    check_that_half_an_epoch_is_left_behind(home, monkeypatch)


def check_that_half_an_epoch_is_left_behind(home: Path, monkeypatch) -> None:
    """By self-critical training, after fewer epochs of cross-entropy."""
    from captioning.training import self_critical

    draw, drawn = self_critical.Rounds.sample, []

    def watched(rounds, epoch, number):
        drawn.append(number)
        return draw(rounds, epoch, number)

    monkeypatch.setattr(self_critical, "ROUND_IMAGES", 13)
    monkeypatch.setattr(self_critical.Rounds, "sample", watched)
    flags = [*FLAGS, *TRAINING, "--run-name", "half"]
    flags += ["--epochs", "3", "--scst-epochs", "1"]
    good("train.py", *flags, folder=home)
    assert drawn == [0, 1]


def test_a_run_that_is_killed_just_after_its_first_weights_resumes(home):
    """From the state before its first step, to the same end."""
    from captioning.training import callbacks

    flags = [*FLAGS, *TRAINING, "--run-name", "early"]
    place = home / "checkpoints" / "early"
    save, end = runs.save_state, callbacks.SavePoints.on_epoch_end

    def save_the_first(place, variables, progress):
        if not progress["epoch"]:
            save(place, variables, progress)

    def fail_at_the_second(points, epoch, logs):
        if epoch == 1:
            raise OSError
        end(points, epoch, logs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save_state", save_the_first)
        patch.setattr(callbacks.SavePoints, "on_epoch_end", fail_at_the_second)
        bad("train.py", *flags, folder=home)
    assert (place / "model.weights.h5").exists()
    assert runs.load_progress(place)["epoch"] == 0
    good("train.py", *flags, folder=home)
    assert_same_run(home, RUN, "early")


def test_self_critical_training_is_resumed_between_two_rounds(
    home, monkeypatch
):
    """Or after cross-entropy that is done: as if it had never been ended."""
    from captioning.training import self_critical

    # Two rounds an epoch.
    monkeypatch.setattr(self_critical, "ROUND_IMAGES", 13)
    flags = [*FLAGS, *TRAINING, "--scst-epochs", "2", "--run-name"]
    broken = home / "checkpoints" / "broken"
    shutil.copytree(home / "checkpoints" / RUN, broken)
    printed = good("train.py", *flags, "sampled", folder=home)
    assert "reward" in printed and "CIDEr on val" in printed
    interrupt(3, 1, *flags, "broken", folder=home)
    printed = good("train.py", *flags, "broken", folder=home)
    assert "Resuming in epoch 4, after step 1" in printed
    assert_same_run(home, "sampled", "broken")
    history = pd.read_csv(broken / "history.csv")
    assert len(history) == 4 and history["reward"].notna().sum() == 2
    assert "trained" in good("train.py", *flags, "sampled", folder=home)


def test_a_run_that_patience_ended_says_so(home):
    """A split of two images is judged by its loss."""
    flags = [*FLAGS, *TRAINING, "--run-name", "steady", "--learning-rate", "0"]
    flags += ["--ema-epochs", "0", "--cider-every", "1", "--patience", "1"]
    flags += ["--epochs"]
    printed = good("train.py", *flags, "5", folder=home)
    assert "2 validation images are too few for CIDEr" in printed
    assert "patience 1" in printed and "epoch 2" in printed
    assert re.search(r"Lowest loss on val: [\d.]+, epoch 1\n", printed)
    printed = good("train.py", *flags, "9", folder=home)
    assert (
        "This run is already trained" in printed
        and "raise --patience" in printed
    )


def test_a_run_starts_from_another(home):
    """With other words; and is resumed with the same command."""
    words = [*FLAGS, "--min-word-count", "9"]
    good("preprocess.py", *words, folder=home)
    flags = [*words, *TRAINING, "--run-name", "warm", "--start-from", RUN]
    printed = good("train.py", *flags, folder=home)
    assert re.search(
        rf"Starting from .*{RUN}, which knows (\d+) of \1", printed
    )
    printed = good("train.py", *flags, folder=home)
    assert "This run is already trained" in printed
    assert "Resuming" not in printed
    good("evaluate.py", *words, *flags[-4:-2], "--split", "val", folder=home)
    assert evaluation(home, "warm", "val")["run"]["started_from"] == RUN
    other = [*flags[:-3], "cold", "--decoder-units", "9", *flags[-2:]]
    assert "give --decoder-units 8" in bad("train.py", *other, folder=home)
    assert not (home / "checkpoints" / "cold").exists()
    flags = [*flags[:-3], "cold", "--start-from", "nothing"]
    assert "no trained run" in bad("train.py", *flags, folder=home)
    flags = [*flags[:-3], "warm", "--start-from", "warm", "--fresh"]
    assert "cannot start from itself" in bad("train.py", *flags, folder=home)
    assert (home / "checkpoints" / "warm" / "model.weights.h5").exists()


def test_a_run_without_weights_is_not_called_trained(home):
    flags = [*FLAGS, *TRAINING, "--run-name", "short"]
    interrupt(1, 2, *flags, "--epochs", "4", "--cider-every", "4", folder=home)
    flags += ["--cider-every", "4", "--epochs"]
    line = bad("train.py", *flags, "1", folder=home)
    assert "has no weights yet" in line and "give --epochs 2" in line
    good("train.py", *flags, "2", folder=home)


def test_a_loss_that_is_no_number_ends_the_run(home, monkeypatch):
    """And what was saved before stays as it was."""
    from captioning.training import callbacks

    monkeypatch.setattr(callbacks, "SAVE_SECONDS", 0)
    flags = [*FLAGS, *TRAINING, "--run-name", "steep"]
    line = bad("train.py", *flags, "--learning-rate", "1e30", folder=home)
    told = re.search(r"loss is (nan|inf) at step (\d+) of epoch 1", line)
    progress = runs.load_progress(home / "checkpoints" / "steep")
    assert progress["batch"] == int(told[2]) - 1


def test_one_photograph_costs_one_and_a_folder_full_batches(home, monkeypatch):
    """With the same caption."""
    sizes, encode = [], extraction.encode

    def watched(images, *arguments, batch):
        sizes.append((len(images), batch))
        return encode(images, *arguments, batch=batch)

    monkeypatch.setattr(extraction, "encode", watched)
    folder = home / "data" / "tiny" / "images"
    photo = sorted(folder.iterdir())[3]
    alone = good("caption.py", *FLAGS, photo, folder=home)
    assert sizes == [(1, 1)]
    found = good("caption.py", *FLAGS, folder, folder=home)
    assert sizes[1:] == [(30, extraction.BATCH)]
    assert alone in found and found.count("\n") == 30


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM")
def test_the_local_page_captions_as_the_command_does(home):
    """And says nothing on standard error, and ends in peace."""
    photo = home / "data" / "tiny" / "images" / "scene_00003.jpg"
    flags = [*FLAGS, "--checkpoints-dir", home / "checkpoints"]
    line = good("caption.py", *flags, photo, folder=home)
    started = process("caption.py", *flags, "--serve", "0", folder=home)
    try:
        address = re.match(r"Open (http://127\.0\.0\.1:\d+) ", told(started))
        form = (
            b'--x\r\nContent-Disposition: form-data; name="photo"; '
            b'filename="x"\r\n\r\n' + photo.read_bytes() + b"\r\n--x--\r\n"
        )
        asked = urllib.request.Request(
            address[1] + "/caption",
            form,
            {"Content-Type": "multipart/form-data; boundary=x"},
        )
        with urllib.request.urlopen(asked) as answer:
            found = json.load(answer)
    finally:
        # Not SIGINT: what runs in the background is born deaf to it.
        started.terminate()
        _, errors = started.communicate(timeout=60)
    assert line == f"{photo}\t{found['caption']}\n"
    assert started.returncode == 0
    assert not [x for x in errors.splitlines() if not x.startswith("Note: ")]


def told(started) -> str:
    """The first line that a process prints."""
    line = started.stdout.readline()
    assert line, started.stderr.read()
    return line


def test_predictions_are_on_disk_before_scoring_starts(home, monkeypatch):
    """Whatever then goes wrong with the scores; and the old set stays."""
    place = home / "checkpoints" / RUN / "evaluation" / "val"
    unfinished = place.with_name("val-unfinished")
    flags = [*FLAGS, "--split", "val"]
    before = {each: each.stat().st_mtime_ns for each in place.rglob("*")}

    def fail(*_):
        raise UserError("the scorer failed")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "score", fail)
        done = run("evaluate.py", *flags, folder=home)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert "the scorer failed" in line and "val-unfinished" in line
    captions = json.loads((unfinished / "captions.json").read_text())
    assert len(captions) > 1 and all(each["caption"] for each in captions)
    assert os.listdir(unfinished) == ["captions.json"]
    saved = ["--captions", unfinished / "captions.json"]
    printed = good("evaluate.py", *flags, *saved, folder=home)
    assert "report.html" not in printed
    (scored,) = place.parent.glob("val-captions-*")
    first, again = (evaluation(home, RUN, x.name) for x in (place, scored))
    for name in ("cider", "bleu1", "mean_length", "vocabulary_used"):
        assert again[name] == first[name] is not None
    assert again["token_accuracy"] is None
    assert again["unavailable"]["token_accuracy"]
    after = {each: each.stat().st_mtime_ns for each in place.rglob("*")}
    assert before == after
    shutil.rmtree(scored)


def test_what_differs_goes_to_a_folder_of_its_own(home, monkeypatch):
    """Another search, fewer images, or the precision of another machine."""
    from captioning import backend

    folder = home / "checkpoints" / RUN
    trained = runs.load_config(folder).precision
    other = "float32" if trained != "float32" else "mixed_bfloat16"
    flags = [*FLAGS, "--split", "val"]
    before = (folder / "evaluation/val/metrics.json").read_bytes()
    monkeypatch.setattr(
        backend, "_multiplies_bfloat16", lambda: other != "float32"
    )
    for more, name, images, beam_size in (
        (["--beam-size", "2"], "val-beam2", 2, 2),
        (
            ["--precision", "auto", "--limit-images", "1"],
            f"val-{other}-limit1",
            1,
            Config.beam_size,
        ),
    ):
        good("evaluate.py", *flags, *more, folder=home)
        found = evaluation(home, RUN, name)
        assert (found["images"], found["beam_size"]) == (images, beam_size)
        precision = other if other in name else trained
        assert found["run"]["precision"] == precision
        assert {*os.listdir(folder / "evaluation" / name)} == results.FILES
    assert (folder / "evaluation/val/metrics.json").read_bytes() == before
    few = ["--captions", folder / "evaluation/val/captions.json"]
    good("evaluate.py", *flags, *few, "--limit-images", "1", folder=home)
    (place,) = folder.glob("evaluation/val-captions-*-limit1")
    shutil.rmtree(place)
    # The split has two images: with more, it is evaluated as a whole.
    good("evaluate.py", *flags, "--limit-images", "9", folder=home)
    assert evaluation(home, RUN, "val")["images"] == 2
    assert not [*folder.glob("evaluation/*limit9")]
    two = [RUN, folder / "evaluation/val-beam2"]
    flags = ["--split", "val", "--compare", *two]
    printed = good("evaluate.py", *flags, folder=home)
    assert "token accuracy" in printed and "not significant" in printed
    page = folder / f"evaluation/val-beam2/compared-with-{RUN}-val.html"
    assert str(page.relative_to(home)) in printed
    assert page.exists() and "were not found" not in printed


def test_an_evaluation_says_what_made_it(home):
    """And whether the run has seen the images: all of them, or none."""
    for split, number, seen in (("train", 26, 26), ("val", 2, 0)):
        printed = good("evaluate.py", *FLAGS, "--split", split, folder=home)
        place = home / "checkpoints" / RUN / "evaluation" / split
        found = evaluation(home, RUN, split)
        assert found["images"] == number
        told = f"was trained on {seen} of these {seen} images"
        assert (told in " ".join(printed.split())) == bool(seen)
        assert (told in (place / "report.html").read_text()) == bool(seen)
        run = found["run"]
        assert run["versions"].pop("keras") and run.pop("date")
        expected = {
            "run": RUN,
            "dataset": "tiny",
            "encoder": "scenes",
            "epoch": 2,
            "seed": 0,
            "started_from": "",
            "images_trained_on": seen,
        }
        assert expected.items() <= run.items()
        low, high = found["intervals"]["token_accuracy"]
        assert low <= found["token_accuracy"] <= high
        assert low < high or not found["token_accuracy"]


def test_a_chinese_dataset_is_captioned_by_characters(home):
    """In every script, though no flag says so."""
    source = home / "data" / "tiny"
    data = home / "data" / "chinese"
    data.mkdir()
    shutil.copytree(source / "images", data / "images")
    table = pd.read_csv(source / "captions.csv").drop_duplicates("image")
    table["caption"] = [
        f"{'红蓝绿'[n % 3]}球在房子旁。" for n in range(len(table))
    ]
    table.to_csv(data / "captions.csv", index=False)
    flags = [*FLAGS, "--dataset", "chinese", "--max-caption-length", "6"]
    assert "each character is a token" in good(
        "preprocess.py", *flags, folder=home
    )
    good("train.py", *flags, *TRAINING, folder=home)
    run_folder = home / "checkpoints" / "chinese-scenes"
    assert runs.load_config(run_folder).tokeniser == "characters"
    flags = ["--dataset", "chinese", "--encoder", "scenes"]
    flags += ["--encoder-weights", "random"]
    printed = good("evaluate.py", *flags, "--split", "val", folder=home)
    assert "character BLEU-4" in printed and "by characters" in printed
    found = evaluation(home, run_folder.name, "val")
    assert found["tokenizer"] == "characters" and found["meteor"] is None
    place = run_folder / "evaluation" / "val"
    entries = json.loads((place / "captions.json").read_text("utf-8"))
    assert not any(" " in each["caption"] for each in entries)
    # Spaces between characters mean nothing.
    for each in entries:
        each["caption"] = " ".join(each["caption"])
    path = home / "spaced.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    flags += ["--split", "val"]
    good("evaluate.py", *flags, "--captions", path, folder=home)
    (again,) = place.parent.glob("val-captions-spaced-*")
    again = evaluation(home, run_folder.name, again.name)
    assert [again[x] for x in ("bleu4", "cider")] == [
        found[x] for x in ("bleu4", "cider")
    ]
    photo = data / "images" / entries[0]["image_id"]
    line = good("caption.py", *flags, "--json", photo, folder=home)
    found = json.loads(line)
    assert found["caption"] == "".join(x["word"] for x in found["words"])
    line = good("caption.py", *flags, photo, folder=home)
    assert line == f"{photo}\t{found['caption']}\n"


def test_captions_from_a_file_are_taken_as_they_are(
    home, tmp_path, monkeypatch
):
    """What is empty or missing scores zero; what is no caption is refused."""

    def no_weights(*_):
        raise AssertionError("captions are scored without the model")

    monkeypatch.setattr(runs, "load_weights", no_weights)
    table = pd.read_csv(home / "data" / "tiny" / "captions.csv")
    table = table[table["split"] == "val"].drop_duplicates("image")
    entries = [
        {"image_id": row.image, "caption": row.caption}
        for row in table.itertuples()
    ]
    path = tmp_path / "captions.json"
    flags = [*FLAGS, "--split", "val", "--captions", path]
    folder = home / "checkpoints" / RUN / "evaluation"

    def scores(entries, encoding="utf-8"):
        path.write_text(json.dumps(entries), encoding)
        printed = good("evaluate.py", *flags, folder=home)
        (place,) = folder.glob("val-captions-*")
        found = evaluation(home, RUN, place.name)
        assert found["run"]["precision"] is None
        shutil.rmtree(place)
        return printed, found["rouge_l"]

    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        printed, whole = scores(entries, encoding)
        assert whole == 1 and "no caption" not in printed
    images, (first, *rest) = len(entries), entries
    for caption in (None, "", "...", "\ud83d"):
        printed, found = scores([{**first, "caption": caption}, *rest])
        assert found == pytest.approx(1 - 1 / images)
        assert f"1 of {images} images have no caption" in printed
    assert scores(rest)[1] == pytest.approx(1 - 1 / images)
    for wrong, told in (
        ([*entries, first], "an image occurs twice"),
        ([{**first, "caption": 5}, *rest], "a caption is not a string"),
        ([{"caption": "a"}], "'image_id'"),
        ({"image_id": "a"}, "not a file of captions"),
        ([{"image_id": "strange.jpg", "caption": "a"}], "strange.jpg"),
    ):
        path.write_text(json.dumps(wrong))
        line = bad("evaluate.py", *flags, folder=home)
        assert told in line and "are kept" not in line
    assert not [*folder.glob("*-unfinished")]
    path.unlink()
    assert "No such file" in bad("evaluate.py", *flags, folder=home)


@pytest.mark.parametrize(
    ("script", "flags", "told"),
    [
        ("preprocess.py", ["--dataset", "nothing"], "data/nothing"),
        ("train.py", [], "preprocess.py"),
        ("evaluate.py", [], "train.py"),
        ("caption.py", ["x.jpg"], "x.jpg"),
    ],
)
def test_what_is_missing_is_told_in_one_line(tmp_path, script, flags, told):
    done = run(script, *flags, folder=tmp_path)
    assert done.returncode == 1
    assert told in done.stderr.replace("\\", "/")


def test_a_split_or_file_that_is_missing_is_told_in_one_line(home, tmp_path):
    line = bad("evaluate.py", *FLAGS, folder=home)
    assert "no split test, only train and val: give --split val" in line
    line = bad(
        "preprocess.py", *FLAGS, "--encoder-weights", "w.h5", folder=home
    )
    assert "w.h5" in line
    data = tmp_path / "data" / "tiny"
    shutil.copytree(home / "data" / "tiny", data)
    table = pd.read_csv(data / "captions.csv")
    table[table["split"] == "val"].to_csv(data / "captions.csv", index=False)
    line = bad("preprocess.py", *FLAGS, folder=tmp_path)
    assert "split train" in line


def test_weights_that_cannot_be_downloaded_are_told_in_one_line(
    tmp_path, monkeypatch
):
    """Before the other encoder has encoded anything."""
    write_sample(tmp_path / "data" / "few", images=10)
    # A cache of Keras that is empty, and no way out to the network.
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    flags = ["--dataset", "few", "--image-size", "32"]
    flags += ["--encoder", "scenes+vgg16"]
    flags += ["--encoder-weights", "random,imagenet"]
    started = process("preprocess.py", *flags, folder=tmp_path)
    _, told = started.communicate()
    assert started.returncode == 1 and "Traceback" not in told
    assert "--encoder-weights" in told.splitlines()[-1]
    assert not list((tmp_path / "data").rglob("captions.csv"))[1:]
    features = tmp_path / "data" / "cache" / "few" / "features"
    assert not list(features.glob("[!.]*"))


@pytest.mark.real_data
def test_the_real_encoder_tells_photographs_apart(real_data, tmp_path):
    """Trained ResNet50: two crops of a photograph are alike, others not."""
    from captioning.data.images import read_image
    from model import build_encoder

    weights = real_data / "weights" / "resnet50_notop.weights.h5"
    encoder = build_encoder(
        Config(
            encoder="resnet50", magnification=1, encoder_weights=str(weights)
        )
    )
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
