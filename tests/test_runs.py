"""The run folder: which config counts, and a state that comes back."""

import dataclasses
import json
import os
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from captioning import command, run_configs, runs
from captioning.data import vocabulary
from captioning.data.vocabulary import SPECIAL_WORDS, Vocabulary
from captioning.features import cache as features
from config import Config, group, resolve
from tests.helpers import refusal

WORDS = Vocabulary((*SPECIAL_WORDS, "dog"))
BEGUN = {
    "words": WORDS,
    "descriptions": [features.describe("resnet50", "conv5", "random-0", 8)],
    "shape": (4, 3),
    "images": runs.digest_images(["b.jpg", "a.jpg"], np.eye(2, 16, dtype="B")),
}
TRAINED = resolve(
    Config(
        learning_rate=0.01, precision="float32", epochs=5, tokeniser="words"
    ),
    ["learning_rate"],
)
LIKE_TRAINED = ["--learning-rate", "0.01", "--precision", "float32"]
NAME = "sample-scenes"


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    """The folder of the runs, where the defaults look for it."""
    monkeypatch.chdir(tmp_path)
    return Path("checkpoints")


@pytest.fixture
def place(checkpoints) -> Path:
    """The folder of a run with the config TRAINED."""
    return save(checkpoints / NAME)


def save(place: Path, **changes) -> Path:
    """Saves TRAINED with other fields; None leaves one out."""
    fields = {**dataclasses.asdict(TRAINED), **changes}
    fields = {k: v for k, v in fields.items() if v is not None}
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return place


def resume(*flags: str) -> Config:
    """The config that train.py takes with flags like those of TRAINED."""
    arguments = command.parse("", {}, [*LIKE_TRAINED, *flags])
    place = runs.folder(arguments.config)
    return run_configs.training_config(arguments.config, arguments.given, place)


def decode(*flags: str) -> Config:
    """The config that evaluate.py and caption.py take."""
    arguments = command.parse("", {}, flags)
    wanted = arguments.config
    config, place = run_configs.decoding_config(wanted, arguments.given)
    assert place == runs.folder(wanted)
    return config


# --- config ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "decodes"),
    [
        ({"word_dropout": None}, True),  # which matters in training only
        ({"embedding_rate": None}, False),
        ({"precision": "auto"}, True),
        ({"views": 2}, True),
        ({"decoder_units": None}, False),
        ({"magnification": None}, False),
        ({"min_word_count": None}, False),
    ],
)
def test_a_config_of_another_version_is_not_filled_in(place, changes, decodes):
    """Today's default would be another run."""
    save(place, **changes)
    message = refusal(resume)
    assert "another version" in message and "--fresh" in message
    assert next(iter(changes)) in message
    if decodes:
        decode()
    else:
        assert next(iter(changes)) in refusal(decode)


def test_the_tokeniser_is_that_of_the_run(place):
    save(place, tokeniser="characters")
    assert resume().tokeniser == decode().tokeniser == "characters"
    assert "--tokeniser characters" in refusal(decode, "--tokeniser", "words")
    save(place, tokeniser="auto")
    assert "another version" in refusal(resume)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"epochs": -1}',
        '{"epochs": "3"}',
        '{"dataset": "../../elsewhere"}',
        '{"run_name": "../../elsewhere"}',
    ],
)
def test_a_damaged_config_is_refused_in_one_line(place, text):
    (place / "config.json").write_text(text, encoding="utf-8")
    assert str(place / "config.json") in refusal(decode)


def test_an_unknown_run_is_reported_with_those_there_are(checkpoints):
    message = refusal(decode)
    assert "run train.py first" in message and "choose one" not in message
    save(checkpoints / "a run"), save(checkpoints / NAME)
    message = refusal(decode, "--run-name", "none")
    assert str(checkpoints / "none") in message
    assert "choose one with --run-name (a run, sample-scenes)" in message


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ([], {}),
        (["--epochs", "20", "--patience", "9"], {"epochs": 20, "patience": 9}),
        (["--data-dir", "a b"], {"data_dir": "a b"}),
        (["--beam-size", "2"], {"beam_size": 2}),
        (["--epochs", "0"], {}),  # left open
        (["--precision", "auto"], {}),  # of whatever machine
    ],
)
def test_a_run_is_resumed_with_its_config_but_for_a_few_fields(
    place, flags, changes
):
    assert resume(*flags) == dataclasses.replace(TRAINED, **changes)
    # A run that does not exist yet takes them all.
    given = command.parse("", {}, [*LIKE_TRAINED, *flags]).config
    assert run_configs.training_config(given, {}, place / "new") == given


@pytest.mark.parametrize(
    ("flags", "was"),
    [
        (["--batch-images", "8"], "batch_images is 16"),
        (["--seed", "1"], "seed is 0"),
        (["--image-size", "64"], "image_size is 224"),
        (["--max-caption-length", "9"], "max_caption_length is 20"),
        (["--learning-rate", "0.1"], "learning_rate is 0.01"),
        (["--precision", "mixed_float16"], "precision is 'float32'"),
        *[
            (
                [f"--{name.replace('_', '-')}", "77"],
                f"{name} is {getattr(TRAINED, name)}",
            )
            for name in group("model")
        ],
    ],
)
def test_what_shapes_a_run_does_not_change(place, flags, was):
    message = refusal(resume, *flags)
    assert was in message and flags[1] in message and str(place) in message
    assert f"give {flags[0]} " in message
    assert "--fresh" in message and "--run-name" in message
    if was.split()[0] not in group("training"):
        assert was in refusal(decode, *flags)


def test_a_default_edited_since_is_refused_or_noticed(place, capsys):
    """Refused where it trains a run; of its model, the run's value counts."""
    arguments = command.parse("", {}, [])
    message = refusal(run_configs.training_config, *arguments[:2], place)
    assert "give --learning-rate 0.01" in message
    save(place, decoder_units=256)
    for find, flags in (
        (resume, []),
        (decode, []),
        (resume, ["--decoder-units", "256"]),
    ):
        assert find(*flags).decoder_units == 256
        out, told = capsys.readouterr()
        assert out == "" and told.count("\n") == 1
        assert "decoder_units is 256 in this run and 128" in told


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--beam-size", "2"], {"beam_size": 2}),
        (["--data-dir", "x", "--epochs", "50"], {"data_dir": "x"}),
        (["--precision", "mixed_bfloat16"], {"precision": "mixed_bfloat16"}),
        (["--limit-images", "5"], {}),  # left to evaluate.py
        (["--dataset", "mine"], {"dataset": "mine"}),
        (["--layout", "coco"], {"layout": "coco"}),
        (
            ["--dataset-dir", "some/photos"],
            {"dataset_dir": "some/photos", "dataset": "photos"},
        ),
        (["--encoder-weights", "x.h5"], {"encoder_weights": "x.h5"}),
        (["--encoder-weights", "auto"], {}),
    ],
)
def test_decoding_takes_the_run_and_what_may_differ(place, flags, changes):
    save(place, val_share=0.2)
    changes = {"run_name": NAME, "val_share": 0.2, **changes}
    expected = dataclasses.replace(TRAINED, **changes)
    assert decode("--run-name", NAME, *flags) == expected


def test_the_search_has_the_defaults_of_the_run_s_dataset(place):
    """A run of photographs may be named without its dataset."""
    assert decode().consensus_temperature == 1
    save(place.with_name("photos"), dataset="photos")
    found = decode("--run-name", "photos")
    assert found.consensus_temperature == Config.consensus_temperature != 1
    given = ["--run-name", "photos", "--consensus-temperature", "1"]
    assert decode(*given).consensus_temperature == 1


def test_averaged_runs_have_a_folder_that_is_no_run(place):
    save(place.with_name("b"))
    for each in (place, place.with_name("b")):
        words = Vocabulary((*SPECIAL_WORDS, "a", "dog"))
        vocabulary.save(words, each / "vocabulary.json")
    members = run_configs.members(Config(), {}, [NAME, "b"])
    both = place.with_name(f"{NAME}+b")
    assert run_configs.together(members) == both
    assert run_configs.together(members[:1]) == place
    save(both)
    assert f"{both} is itself a run" in refusal(run_configs.together, members)
    asked = run_configs.members, Config()
    message = refusal(*asked, {"run_name": NAME}, [NAME, "b"])
    assert "--run-name contradict each other" in message
    told = "differ in vocabulary or max_caption_length"
    save(place.with_name("b"), max_caption_length=9)
    assert told in refusal(*asked, {}, [NAME, "b"])
    words = Vocabulary((*SPECIAL_WORDS, "dog", "a"))
    vocabulary.save(words, save(place.with_name("b")) / "vocabulary.json")
    assert told in refusal(*asked, {}, [NAME, "b"])


def test_a_folder_that_is_no_run_is_not_made_one(checkpoints):
    place = checkpoints / NAME
    place.mkdir(parents=True)
    for name in ("vocabulary.json", runs.IMAGES, ".part-config.json"):
        (place / name).write_text("")  # of a run that was killed as it began
    resume()
    (place / "history.csv").write_text("mine")
    assert "it contains history.csv" in refusal(resume)
    assert "it contains history.csv" in refusal(runs.set_aside, place)
    (checkpoints / "file").write_text("mine")
    assert "is not a run" in refusal(resume, "--run-name", "file")


def test_without_a_name_the_newest_run_of_photographs_captions(checkpoints):
    wanted = str(checkpoints)
    assert "git checkout" in refusal(runs.newest_of_photographs, wanted)
    kinds = {
        "pretrained": "flickr8k",
        "old": "mine",
        "new": "mine",
        "scenes": "sample",
    }
    for age, (name, dataset) in enumerate(kinds.items()):
        save(checkpoints / name, dataset=dataset)
        (checkpoints / name / "model.weights.h5").touch()
        os.utime(checkpoints / name / "model.weights.h5", (age, age))
        if name != "scenes":
            assert runs.newest_of_photographs(wanted) == name
    # The pretrained run only where there is no other, whatever its age.
    os.utime(checkpoints / "pretrained" / "model.weights.h5", (9, 9))
    assert runs.newest_of_photographs(wanted) == "new"
    (checkpoints / "begun" / "last").mkdir(parents=True)
    save(checkpoints / "begun", dataset="mine")  # no weights yet
    assert runs.newest_of_photographs(wanted) == "new"


def test_a_run_without_a_state_is_not_trained_over(place):
    """Such as the pretrained one."""
    (place / "model.weights.h5").write_bytes(b"weights")
    assert "--start-from sample-scenes" in refusal(resume)
    assert (place / "model.weights.h5").read_bytes() == b"weights"


def test_a_run_that_is_set_aside_keeps_its_files(place):
    before = (place / "config.json").read_bytes()
    aside = runs.set_aside(place)
    assert not place.exists() and aside.parent == place.parent
    assert aside.name.startswith("sample-scenes-before-")
    assert (aside / "config.json").read_bytes() == before


# --- what a run was trained on --------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"words": Vocabulary((*WORDS.words, "cat"))}, "vocabulary has"),
        ({"shape": (2, 3)}, "encoder has"),
        ({"descriptions": BEGUN["descriptions"] * 2}, "encoder has"),
        ({"images": BEGUN["images"][:1]}, "training images have"),
    ],
)
def test_a_run_is_not_resumed_with_other_words_or_features(
    tmp_path, change, told
):
    runs.begin(TRAINED, tmp_path, **BEGUN | change)  # nothing trained yet
    runs.begin(TRAINED, tmp_path, **BEGUN)
    runs.save_state(tmp_path, [], {})
    runs.begin(TRAINED, tmp_path, **BEGUN)
    message = refusal(runs.begin, TRAINED, tmp_path, *(BEGUN | change).values())
    assert f"the {told} changed" in message and "--fresh" in message
    assert runs.load_description(tmp_path)[1] == BEGUN["shape"]


def test_images_of_training_are_found_by_pixels_and_within_a_dataset_by_name(
    tmp_path,
):
    pixels = np.zeros((4, 16), np.uint8)
    pixels[:3, :3] = np.eye(3)  # of the last image they are not known
    names = ["a/1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    images = runs.digest_images(names, pixels)
    others = np.zeros((4, 16), np.uint8)
    others[0] = pixels[0]
    others[1, 5] = 1  # the same photograph, saved again
    asked = tmp_path, ["renamed.jpg", "2.jpg", "1.jpg", "4.jpg"], others
    assert runs.trained_on(*asked, same_dataset=True) is None  # no record
    runs.begin(TRAINED, tmp_path, **BEGUN | {"images": images})
    found = runs.trained_on(*asked, same_dataset=True)
    assert found.tolist() == [True, True, False, True]
    found = runs.trained_on(*asked, same_dataset=False)
    assert found.tolist() == [True, False, False, False]
    assert "jpg" not in (tmp_path / "training_images.csv").read_text()


def test_images_of_the_run_that_a_run_started_from_count_too(tmp_path):
    old, new, pixels = tmp_path / "old", tmp_path / "new", np.eye(4, 16)
    pixels = (pixels * 255).astype(np.uint8)
    images = runs.digest_images(["1.jpg"], pixels[:1])
    runs.begin(TRAINED, old, **BEGUN | {"images": images})
    own = BEGUN | {"images": runs.digest_images(["2.jpg"], pixels[1:2])}
    runs.begin(TRAINED, new, **own, start=old)
    asked = new, ["1.jpg", "2.jpg", "a.jpg", "3.jpg"], pixels[[2, 1, 0, 3]]
    found = runs.trained_on(*asked, same_dataset=True)
    assert found.tolist() == [False, True, True, False]
    # It is resumed with or without the flag, and from no other run.
    runs.save_state(new, [], {})
    for start in (old, None):
        runs.begin(TRAINED, new, **own, start=start)
        assert runs.load_description(new).started_from == "old"
    message = refusal(runs.begin, TRAINED, new, *own.values(), tmp_path / "no")
    assert "the starting run has changed" in message


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "5", '{"shape": 3}'])
def test_a_damaged_record_of_the_features_is_refused(tmp_path, text):
    (tmp_path / "features.json").write_text(text, encoding="utf-8")
    assert "features.json" in refusal(runs.load_description, tmp_path)


# --- weights --------------------------------------------------------------


class Model:
    """Stands for a Keras model; its weights are a text."""

    def __init__(self, weights: str = "") -> None:
        self.weights = weights

    def save_weights(self, path: Path) -> None:
        with h5py.File(path, "w") as file:
            file["weights"] = self.weights

    def load_weights(self, path: Path) -> None:
        with h5py.File(path) as file:
            self.weights = file["weights"][()].decode()
        if self.weights == "other":
            raise ValueError("Layer 'x' expected 2 variables\nReceived 3")


def test_the_best_weights_come_back_or_are_refused(tmp_path):
    model = Model()
    assert "train.py" in refusal(runs.load_weights, model, tmp_path)
    runs.save_weights(Model("best"), tmp_path, 7)
    runs.load_weights(model, tmp_path)
    assert model.weights == "best" and runs.best_epoch(tmp_path) == 7
    assert os.listdir(tmp_path) == ["model.weights.h5"]
    runs.save_weights(Model("other"), tmp_path, 1)
    message = refusal(runs.load_weights, model, tmp_path)
    assert "does not fit" in message and "expected 2 variables" in message


# --- state ----------------------------------------------------------------


def make_variables(seed: int = 0) -> list[keras.Variable]:
    """Variables of every kind that a run has: more than ten, none round."""
    random = np.random.default_rng(seed)
    odd = np.array([-0.0, 1e-42, np.inf, np.nan], np.float32)
    return [
        keras.Variable(random.normal(size=(50, 20)).astype(np.float32)),
        keras.Variable(np.roll(odd, seed)),
        keras.Variable(7 + seed, dtype="int32"),
        keras.Variable(random.integers(2**32, size=2, dtype=np.uint32)),
        *[keras.Variable(random.normal(), dtype="float32") for _ in range(9)],
    ]


def values(variables: list[keras.Variable]) -> list[tuple]:
    arrays = [np.asarray(each.value) for each in variables]
    return [(each.dtype, each.shape, each.tobytes()) for each in arrays]


def test_a_state_comes_back_bit_for_bit(tmp_path):
    assert runs.load_progress(tmp_path) is None
    saved, others = make_variables(), make_variables(1)
    progress = {"epoch": 3, "best": 0.1 + 0.2, "history": [{"loss": 1.5}]}
    runs.save_state(tmp_path, saved, progress)
    assert values(others) != values(saved)
    assert runs.load_progress(tmp_path) == progress
    runs.load_state(tmp_path, others)
    assert values(others) == values(saved)
    assert os.listdir(tmp_path / "last") == ["state.npz"]


@pytest.mark.parametrize("change", ["fewer", "more", "other shape"])
def test_the_state_of_another_model_is_refused(tmp_path, change):
    runs.save_state(tmp_path, make_variables(), {})
    others = make_variables(1)
    if change == "fewer":
        others.pop()
    elif change == "more":
        others.append(keras.Variable(1.0))
    else:
        others[0] = keras.Variable(np.zeros((20, 50), np.float32))
    before = values(others)
    message = refusal(runs.load_state, tmp_path, others)
    assert "another model" in message and "--fresh" in message
    assert values(others) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no state",
        lambda data: data[:-100],
        lambda data: data[:1000] + b"\xff\0\xff" + data[1003:],
    ],
    ids=["empty", "text", "cut", "changed"],
)
def test_a_damaged_state_is_refused_in_one_line(tmp_path, damage):
    variables = make_variables()
    runs.save_state(tmp_path, variables, {"epoch": 3})
    path = tmp_path / "last" / "state.npz"
    path.write_bytes(damage(path.read_bytes()))

    def resume() -> None:
        runs.load_progress(tmp_path)
        runs.load_state(tmp_path, variables)

    message = refusal(resume)
    assert str(path) in message and "--fresh" in message
