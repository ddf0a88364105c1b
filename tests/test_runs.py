"""The run folder: which config counts, and a state that comes back."""

import dataclasses
import json
import os
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from captioning import command, runs
from captioning.data.vocabulary import SPECIAL_WORDS, Vocabulary
from captioning.features import cache as features
from config import Config, UserError, group, resolve

WORDS = Vocabulary((*SPECIAL_WORDS, "dog"))
DESCRIPTION = features.describe("resnet50", "conv5", "random-0", 8)
SHAPE = (4, 3)
IMAGES = runs.digest_images(["a.jpg", "b.jpg"], np.eye(2, 16, dtype=np.uint8))
TRAINED = resolve(Config(epochs=6, learning_rate=0.01, precision="float32"))
LIKE_TRAINED = ["--learning-rate", "0.01", "--precision", "float32"]


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    """The folder of the runs, where the defaults look for it."""
    monkeypatch.chdir(tmp_path)
    return Path("checkpoints")


@pytest.fixture
def place(checkpoints) -> Path:
    """The folder of a run with the config TRAINED."""
    runs.save_config(TRAINED, checkpoints / "sample-resnet50")
    return checkpoints / "sample-resnet50"


def training_config(place: Path, *words: str) -> Config:
    arguments = command.parse("", arguments=words)
    return runs.training_config(arguments.config, arguments.given, place)


def decoding_config(*words: str) -> tuple[Config, Path]:
    arguments = command.parse("", arguments=words)
    return runs.decoding_config(arguments.config, arguments.given)


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- config ---------------------------------------------------------------


def test_a_run_is_named_after_dataset_and_encoder_unless_it_has_a_name():
    found = runs.folder(resolve(Config()))
    assert found == Path("checkpoints/sample-resnet50")
    config = Config(dataset="flickr8k", encoder="vgg16", checkpoints_dir="x")
    assert runs.folder(resolve(config)) == Path("x/flickr8k-vgg16")
    named = dataclasses.replace(config, run_name="mine")
    assert runs.folder(named) == Path("x/mine")


def test_a_config_comes_back_as_it_was_saved(tmp_path):
    config = Config(dataset="\u72ac", learning_rate=1 / 3, seed=2**32 - 1)
    runs.save_config(config, tmp_path / "new")
    assert runs.load_config(tmp_path / "new") == config


def save_fields(place: Path, **changes) -> None:
    """Saves TRAINED with other fields; None leaves one out."""
    fields = {**dataclasses.asdict(TRAINED), **changes}
    fields = {k: v for k, v in fields.items() if v is not None}
    (place / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def test_a_field_that_a_run_lacks_is_not_filled_in(place):
    """Today's default would be another run: one line, whatever is asked."""
    save_fields(place, embedding_rate=None)
    message = refusal(training_config, place, *LIKE_TRAINED)
    assert "embedding_rate" in message and "--fresh" in message
    assert "earlier versions" in message
    assert decoding_config()[0].epochs == 6  # training does not matter here
    for name in ("decoder_units", "magnification", "min_word_count"):
        save_fields(place, **{name: None})
        assert name in refusal(training_config, place, *LIKE_TRAINED)
        message = refusal(decoding_config)
        assert name in message and "earlier versions" in message


def test_a_run_that_left_its_precision_open_is_not_resumed(place):
    save_fields(place, precision="auto")
    message = refusal(training_config, place, *LIKE_TRAINED)
    assert "does not say what precision was" in message
    assert decoding_config()[0].precision == "auto"


def test_a_field_that_this_version_does_not_know_ends_training(place):
    save_fields(place, views=2)
    assert "views" in refusal(training_config, place, *LIKE_TRAINED)
    assert decoding_config()[0].epochs == 6


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"epochs": 0}', '{"epochs": "3"}'],
)
def test_a_config_that_was_spoiled_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    refusal(runs.load_config, tmp_path)


# --- training -------------------------------------------------------------


def test_a_new_run_takes_what_config_and_flags_say(checkpoints):
    config = training_config(checkpoints / "new", "--epochs", "3")
    assert config == resolve(Config(epochs=3))


def test_a_run_goes_on_with_its_own_config(place, capsys):
    config = training_config(place, *LIKE_TRAINED, "--epochs", "6")
    assert config == TRAINED
    assert capsys.readouterr().err == ""


def test_a_run_that_goes_on_may_have_more_epochs_and_patience(place):
    config = training_config(
        place, *LIKE_TRAINED, "--epochs", "20", "--patience", "9"
    )
    assert config == dataclasses.replace(TRAINED, epochs=20, patience=9)


def test_places_and_decoding_are_those_of_now(place):
    flags = ["--data-dir", "else where", "--beam-size", "2"]
    config = training_config(place, *LIKE_TRAINED, *flags)
    assert (config.data_dir, config.beam_size) == ("else where", 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch-images", "8"], "batch_images is 16"),
        (["--seed", "1"], "seed is 0"),
        (["--image-size", "64"], "image_size is 224"),
        (["--max-caption-length", "9"], "max_caption_length is 20"),
        (["--learning-rate", "0.1"], "learning_rate is 0.01"),
    ],
)
def test_another_field_may_not_change_in_a_run_that_goes_on(place, words, told):
    message = refusal(training_config, place, *LIKE_TRAINED, *words)
    assert told in message and words[1] in message and str(place) in message
    assert "--fresh" in message and "--run-name" in message


def test_a_choice_that_is_left_open_is_what_the_run_has(place):
    flags = ["--epochs", "6", "--batch-images", "0", "--precision", "auto"]
    config = training_config(
        place, *LIKE_TRAINED[:2], *flags, "--magnification", "0"
    )
    assert config == TRAINED
    runs.save_config(
        dataclasses.replace(
            TRAINED, dataset="mine", magnification=3, encoder_weights="x.h5"
        ),
        place,
    )
    flags = ["--run-name", place.name, "--magnification", "0"]
    config, _ = decoding_config(*flags, "--encoder-weights", "auto")
    assert (config.magnification, config.encoder_weights) == (3, "x.h5")


def test_a_default_that_counts_now_is_refused_with_the_flag_to_give(place):
    message = refusal(training_config, place)
    assert "learning_rate is 0.01" in message
    assert "--learning-rate 0.01" in message


@pytest.mark.parametrize("name", group("model"))
def test_the_model_of_a_run_may_not_change(place, name):
    flag = "--" + name.replace("_", "-")
    for function, first in ((training_config, [place]), (decoding_config, [])):
        message = refusal(function, *first, *LIKE_TRAINED, flag, "77")
        assert f"{name} is 512" in message and "77" in message
        assert "--run-name" in message


def test_an_edited_default_of_the_model_is_one_line_of_notice(
    checkpoints, capsys
):
    place = checkpoints / "sample-resnet50"
    runs.save_config(dataclasses.replace(TRAINED, decoder_units=256), place)
    for find in (
        lambda: training_config(place, *LIKE_TRAINED),
        lambda: decoding_config()[0],
    ):
        assert find().decoder_units == 256
        out, told = capsys.readouterr()
        assert out == "" and told.count("\n") == 1
        assert "decoder_units is 256 in this run and 512" in told


def test_a_model_flag_that_says_what_the_run_has_is_accepted(checkpoints):
    place = checkpoints / "sample-resnet50"
    runs.save_config(dataclasses.replace(TRAINED, decoder_units=256), place)
    config = training_config(place, *LIKE_TRAINED, "--decoder-units", "256")
    assert config.decoder_units == 256


# --- decoding -------------------------------------------------------------


def test_decoding_takes_the_run_and_the_decoding_fields_of_now(place):
    config, found = decoding_config(
        *("--beam-size", "2", "--split", "val", "--data-dir", "x"),
    )
    assert found == place
    assert config == dataclasses.replace(
        TRAINED, beam_size=2, split="val", data_dir="x"
    )


def test_decoding_has_the_precision_of_the_run_unless_told_otherwise(place):
    assert decoding_config()[0].precision == "float32"
    config, _ = decoding_config("--precision", "mixed_bfloat16")
    assert config.precision == "mixed_bfloat16"


def test_a_run_is_resumed_in_its_precision_on_any_machine(place):
    config = training_config(place, "--learning-rate", "0.01")
    assert config.precision == "float32"
    flags = ["--learning-rate", "0.01", "--precision", "mixed_float16"]
    assert "precision is 'float32'" in refusal(training_config, place, *flags)


def test_decoding_ignores_the_training_fields_of_now(place):
    config, _ = decoding_config("--epochs", "50", "--batch-images", "3")
    assert config.epochs == 6 and config.batch_images == 16


def test_decoding_may_look_at_another_dataset(place):
    flags = ["--run-name", place.name, "--dataset", "mine", "--layout", "coco"]
    config, found = decoding_config(*flags, "--encoder-weights", "x.h5")
    assert found == place
    assert (config.dataset, config.layout) == ("mine", "coco")
    assert config.encoder_weights == "x.h5"


def test_decoding_may_look_at_a_folder_that_names_its_dataset(place):
    config, _ = decoding_config(
        "--run-name", place.name, "--dataset-dir", "some/photos"
    )
    assert (config.dataset, config.dataset_dir) == ("photos", "some/photos")


@pytest.mark.parametrize("field", ["dataset", "run_name"])
def test_a_saved_name_that_leads_elsewhere_is_refused(place, field):
    path = place / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, field: "../../elsewhere"}))
    message = refusal(decoding_config)
    assert "plain folder name" in message and str(path) in message


def test_decoding_keeps_the_dataset_of_the_run(checkpoints):
    runs.save_config(
        Config(dataset="mine", val_share=0.2), checkpoints / "named"
    )
    config, _ = decoding_config("--run-name", "named")
    assert (config.dataset, config.val_share) == ("mine", 0.2)


def test_decoding_fewer_images_leaves_the_dataset_of_the_run(place):
    config, _ = decoding_config("--limit-images", "5")
    assert config.limit_images == 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--max-caption-length", "9"), ("--image-size", "64")],
)
def test_decoding_refuses_flags_that_contradict_the_run(place, flag, value):
    message = refusal(decoding_config, flag, value)
    assert flag[2:].replace("-", "_") in message and value in message


def test_an_unknown_run_is_told_with_those_there_are(place):
    runs.save_config(Config(), place.with_name("a run"))
    message = refusal(decoding_config, "--run-name", "none")
    assert str(place.with_name("none")) in message and "train.py" in message
    assert "(there are a run, sample-resnet50)" in message


def test_without_any_run_the_user_is_told_to_train(checkpoints):
    message = refusal(decoding_config)
    assert "run train.py first" in message and "there are" not in message


# --- the folder -----------------------------------------------------------


def test_a_run_that_is_set_aside_keeps_its_files_under_another_name(place):
    before = (place / "config.json").read_bytes()
    aside = runs.set_aside(place)
    assert not place.exists() and aside.parent == place.parent
    assert aside.name.startswith("sample-resnet50-before-")
    assert (aside / "config.json").read_bytes() == before


def test_a_run_that_begins_is_complete_without_the_data(tmp_path):
    runs.begin(TRAINED, tmp_path, WORDS, DESCRIPTION, SHAPE, IMAGES)
    assert runs.load_config(tmp_path) == TRAINED
    assert runs.vocabulary.load(tmp_path / "vocabulary.json") == WORDS
    assert runs.load_description(tmp_path) == (DESCRIPTION, SHAPE)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"words": Vocabulary((*WORDS.words, "cat"))}, "vocabulary"),
        ({"shape": (2, 3)}, "encoder"),
        ({"description": {**DESCRIPTION, "weights": "other"}}, "encoder"),
        ({"images": IMAGES[:1]}, "training images"),
    ],
)
def test_a_run_does_not_go_on_with_other_words_or_features(
    tmp_path, change, told
):
    given = {
        "words": WORDS,
        "description": DESCRIPTION,
        "shape": SHAPE,
        "images": IMAGES,
    }
    runs.begin(TRAINED, tmp_path, **given)
    runs.begin(TRAINED, tmp_path, **given | change)  # nothing trained yet
    runs.begin(TRAINED, tmp_path, **given)
    runs.save_state(tmp_path, [], {})
    runs.begin(TRAINED, tmp_path, **given)
    message = refusal(runs.begin, TRAINED, tmp_path, *(given | change).values())
    assert f"the {told} ha" in message and "--fresh" in message
    assert runs.load_description(tmp_path) == (DESCRIPTION, SHAPE)


def test_what_was_trained_on_is_found_by_pixels_and_within_a_dataset_by_name(
    tmp_path,
):
    pixels = np.zeros((4, 16), np.uint8)
    pixels[:3, :3] = np.eye(3)  # of the last image they are not known
    runs.begin(
        *(TRAINED, tmp_path, WORDS, DESCRIPTION, SHAPE),
        runs.digest_images(["a/1.jpg", "2.jpg", "3.jpg", "4.jpg"], pixels),
    )
    names = ["renamed.jpg", "2.jpg", "1.jpg", "4.jpg"]
    others = np.zeros((4, 16), np.uint8)
    others[0] = pixels[0]
    others[1, 5] = 1  # the same photograph, saved again
    seen = runs.trained_on(tmp_path, names, others, same_dataset=True)
    assert seen.tolist() == [True, True, False, True]
    seen = runs.trained_on(tmp_path, names, others, same_dataset=False)
    assert seen.tolist() == [True, False, False, False]
    text = (tmp_path / "training_images.csv").read_text()
    assert "jpg" not in text


def test_a_run_without_a_record_of_its_images_is_not_known(tmp_path):
    pixels = np.zeros((1, 16), np.uint8)
    assert runs.trained_on(tmp_path, ["a.jpg"], pixels, True) is None


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "5", '{"shape": 3}'])
def test_spoiled_notes_on_the_features_are_refused(tmp_path, text):
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


def test_the_best_weights_come_back(tmp_path):
    runs.save_weights(Model("best"), tmp_path, 7)
    model = Model()
    runs.load_weights(model, tmp_path)
    assert model.weights == "best"
    assert runs.best_epoch(tmp_path) == 7
    assert os.listdir(tmp_path) == ["model.weights.h5"]


def test_weights_that_are_not_there_or_do_not_fit_are_told(tmp_path):
    message = refusal(runs.load_weights, Model(), tmp_path)
    assert "train.py" in message
    runs.save_weights(Model("other"), tmp_path, 1)
    message = refusal(runs.load_weights, Model(), tmp_path)
    assert "does not fit" in message and "expected 2 variables" in message


# --- state ----------------------------------------------------------------


def make_variables(seed: int = 0) -> list[keras.Variable]:
    """Variables of every kind that a run has, none of them round."""
    random = np.random.default_rng(seed)
    odd = np.array([-0.0, 1e-42, np.inf, np.nan], np.float32)
    return [
        keras.Variable(random.normal(size=(50, 20)).astype(np.float32)),
        keras.Variable(np.roll(odd, seed)),
        keras.Variable(7 + seed, dtype="int32"),
        keras.Variable(random.integers(2**32, size=2, dtype=np.uint32)),
        keras.Variable(random.normal(), dtype="float32"),
    ]


def values(variables: list[keras.Variable]) -> list[tuple]:
    arrays = [np.asarray(each.value) for each in variables]
    return [(each.dtype, each.shape, each.tobytes()) for each in arrays]


def test_a_state_comes_back_bit_for_bit(tmp_path):
    saved, others = make_variables(), make_variables(1)
    progress = {"epoch": 3, "best": 0.1 + 0.2, "history": [{"loss": 1.5}]}
    runs.save_state(tmp_path, saved, progress)
    assert values(others) != values(saved)
    assert runs.load_progress(tmp_path) == progress
    runs.load_state(tmp_path, others)
    assert values(others) == values(saved)
    assert os.listdir(tmp_path / "last") == ["state.npz"]


def test_more_than_ten_variables_keep_their_order(tmp_path):
    saved = [keras.Variable(float(number)) for number in range(12)]
    runs.save_state(tmp_path, saved, {})
    others = [keras.Variable(-1.0) for _ in saved]
    runs.load_state(tmp_path, others)
    assert values(others) == values(saved)


def test_a_state_that_cannot_be_saved_leaves_the_one_before(
    tmp_path, monkeypatch
):
    def fail(path: Path, **arrays) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    variables = make_variables()
    runs.save_state(tmp_path, variables, {"epoch": 1})
    monkeypatch.setattr(runs.np, "savez", fail)
    with pytest.raises(OSError, match="no space"):
        runs.save_state(tmp_path, variables, {"epoch": 2})
    assert runs.load_progress(tmp_path) == {"epoch": 1}
    assert os.listdir(tmp_path / "last") == ["state.npz"]


def test_a_run_that_has_not_begun_has_no_progress(tmp_path):
    assert runs.load_progress(tmp_path) is None


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
    "spoil",
    [
        lambda data: b"",
        lambda data: b"no state",
        lambda data: data[:-100],
        lambda data: data[:1000] + b"\xff\0\xff" + data[1003:],
    ],
    ids=["empty", "text", "cut", "changed"],
)
def test_a_spoiled_state_is_refused_in_one_line(tmp_path, spoil):
    variables = make_variables()
    runs.save_state(tmp_path, variables, {"epoch": 3})
    path = tmp_path / "last" / "state.npz"
    path.write_bytes(spoil(path.read_bytes()))

    def resume() -> None:
        runs.load_progress(tmp_path)
        runs.load_state(tmp_path, variables)

    message = refusal(resume)
    assert str(path) in message and "--fresh" in message
