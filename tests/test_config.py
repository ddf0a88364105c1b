"""The hyperparameters: their groups, their limits, what is refused."""

import dataclasses
import math
import os
from pathlib import Path

import pytest

from config import ENCODERS, GROUPS, OPEN, Config, UserError, group, resolve

FIELDS = dataclasses.fields(Config)


def limited(limit: str) -> list:
    return [
        pytest.param(each.name, each.metadata[limit], id=each.name)
        for each in FIELDS
        if each.metadata[limit] not in (None, ())
    ]


def refusal(**fields) -> str:
    with pytest.raises(UserError) as error:
        Config(**fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_each_field_is_in_one_group_and_has_a_text_for_help():
    names = [name for each in GROUPS for name in group(each)]
    assert sorted(names) == sorted(each.name for each in FIELDS)
    assert all(each.metadata["help"] for each in FIELDS)


def test_the_defaults_that_other_programs_rely_on():
    defaults = {
        "dataset": "sample",
        "dataset_dir": "",
        "data_dir": "data",
        "checkpoints_dir": "checkpoints",
        "run_name": "",
        "encoder_weights": "auto",
        "image_size": 224,
        "min_caption_length": 1,
        "split": "test",
        "limit_images": 0,
        "max_skipped_share": 0.05,
    }
    config = Config()
    assert defaults.items() <= dataclasses.asdict(config).items()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3


@pytest.mark.parametrize(("name", "least"), limited("least"))
def test_the_least_value_is_accepted_and_one_below_is_refused(name, least):
    assert getattr(Config(**{name: least}), name) == least
    told = f"{name} {least - 1} is below {least}"
    assert refusal(**{name: least - 1}) == told


@pytest.mark.parametrize(("name", "most"), limited("most"))
def test_one_above_the_greatest_value_is_refused(name, most):
    assert refusal(**{name: most + 1}) == f"{name} {most + 1} is above {most}"
    if name not in ("val_share", "test_share"):  # one wants the other at 0
        Config(**{name: most})


@pytest.mark.parametrize(
    "name", [each.name for each in FIELDS if each.type is float]
)
def test_what_is_no_number_is_refused(name):
    assert refusal(**{name: math.nan}).startswith(f"{name} nan")


@pytest.mark.parametrize(("name", "choices"), limited("choices"))
def test_a_name_that_is_no_choice_is_refused_with_those_there_are(
    name, choices
):
    for choice in choices:
        Config(**{name: choice})
    message = refusal(**{name: "nonsense"})
    assert name in message and all(choice in message for choice in choices)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"min_caption_length": 8, "max_caption_length": 7},
            "min_caption_length 8",
        ),
        ({"val_share": 0.5, "test_share": 0.5}, "val_share"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, told):
    assert told in refusal(**fields)
    Config(min_caption_length=7, max_caption_length=7)


@pytest.mark.parametrize("name", [x for x in ENCODERS if x != "scenes"])
def test_each_encoder_is_one_of_keras_applications(name):
    from keras import applications

    encoder = ENCODERS[name]
    assert callable(getattr(applications, encoder.application))
    assert callable(getattr(applications, encoder.module).preprocess_input)


# --- names ----------------------------------------------------------------

BAD_NAMES = (
    "a/b /abs a/ .. ../x a\\b \\\\host\\x . ... C: C:x C:\\x a. .hidden "
)
BAD_NAMES += 'con NUL nul.txt Com1 lpt9.tar.gz a* a? a|b <a> "a" \ud800'
SPACES = [" ", ". .", "a\0b", "a\nb", "a ", " a", "aux .x", "x" * 121]


@pytest.mark.parametrize("name", [*BAD_NAMES.split(), *SPACES], ids=ascii)
def test_only_the_name_of_a_plain_folder_names_a_dataset_or_a_run(name):
    message = refusal(dataset=name)
    assert "dataset" in message and "--dataset-dir" in message
    message = refusal(run_name=name)
    assert "run_name" in message and "--checkpoints-dir" in message


def test_a_dataset_is_not_called_as_the_folder_of_the_caches():
    for name in ("cache", "Cache"):
        assert "caches" in refusal(dataset=name)
        Config(run_name=name)
    assert "plain folder name" in refusal(dataset="")


GOOD_NAMES = "flickr30k v1.2 caf\u00e9\u72ac a+b -x nullable com10 a..b caches"


@pytest.mark.parametrize("name", [*GOOD_NAMES.split(), "my photos", "x" * 120])
def test_other_names_are_accepted(name):
    config = Config(dataset=name, run_name=name)
    assert resolve(config).run_name == name


# --- choices that are left open -------------------------------------------


def test_a_resolved_config_leaves_the_machine_and_the_data_a_choice():
    for dataset in ("sample", "mine"):
        config = resolve(Config(dataset=dataset))
        left = {n for n, value in OPEN.items() if getattr(config, n) == value}
        assert left == {"precision", "epochs", "tokeniser"}
        assert resolve(config) == config


@pytest.mark.parametrize(
    ("name", "sample", "photographs", "own"),
    [
        ("magnification", 1, 2, 3),
        ("input_size", 224, 448, None),
        ("encoder", "scenes", "resnet50+xception", "vgg16"),
        ("encoder_weights", "scenes", "imagenet", "w.h5"),
        ("decoder_units", 128, 512, 512),
    ],
)
def test_the_sample_is_quick_unless_told_otherwise(
    name, sample, photographs, own
):
    """It is not enlarged, needs no weights, and has a small decoder."""
    for dataset, value in (("sample", sample), ("flickr8k", photographs)):
        config = Config(dataset=dataset)
        assert getattr(resolve(config), name) == value
        if own:
            config = dataclasses.replace(config, **{name: own})
            assert getattr(resolve(config, [name]), name) == own


def test_the_encoder_of_scenes_has_its_weights_on_every_dataset():
    config = Config(dataset="farm", encoder="vgg16+scenes")
    assert resolve(config).encoder_weights == "imagenet,scenes"


# --- dataset_dir ----------------------------------------------------------


def test_dataset_dir_alone_names_the_dataset(tmp_path, monkeypatch):
    (tmp_path / "farm" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "farm")
    for folder in (".", "../farm", "inner/..", str(tmp_path / "farm") + "/"):
        config = resolve(Config(dataset_dir=folder), ["dataset_dir"])
        assert config.dataset == "farm"
        assert config.encoder == "resnet50+xception"
        assert config.run_name == "farm-resnet50+xception"
        assert config.encoder_weights == "imagenet"
        assert config.magnification == 2
        # The same if it stands in config.py.
        assert resolve(Config(dataset_dir=folder)).dataset == "farm"
    os.symlink(tmp_path / "farm", tmp_path / "link")
    config = Config(dataset_dir=str(tmp_path / "link"))
    assert resolve(config, ["dataset_dir"]).dataset == "farm"


def test_a_dataset_that_is_named_keeps_its_name():
    config = Config(dataset="trip", dataset_dir="/some/farm")
    assert resolve(config, ["dataset", "dataset_dir"]).dataset == "trip"
    assert resolve(config).dataset == "trip"
    # A flag that names the folder counts for more than a name in config.py.
    assert resolve(config, ["dataset_dir"]).dataset == "farm"


@pytest.mark.parametrize("folder", ["/", "x/cache", "x/a:b", "x/.y", "x/con"])
def test_a_folder_that_gives_no_name_wants_one(folder):
    with pytest.raises(UserError, match="another name with --dataset") as e:
        resolve(Config(dataset_dir=folder), ["dataset_dir"])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("given", [["dataset_dir"], ["dataset"]])
def test_a_dataset_among_the_caches_is_refused(given):
    """Its cache would be written between its own files."""
    folder = str(Path("data") / "cache" / "farm")
    config = Config(dataset="farm", dataset_dir=folder)
    with pytest.raises(UserError, match="lies inside the cache folder"):
        resolve(config, given)
    resolve(dataclasses.replace(config, data_dir="elsewhere"), given)


@pytest.mark.parametrize("given", [[], ["dataset_dir"], ["dataset"]])
def test_photographs_are_not_called_like_the_sample(given):
    """Whose encoder knows what is drawn, and nothing else."""
    with pytest.raises(UserError, match="the built-in sample"):
        resolve(Config(dataset_dir="elsewhere/sample"), given)
    own = Config(dataset_dir=str(Path("data") / "sample"))
    assert resolve(own, given).encoder_weights == "scenes"
    own = dataclasses.replace(own, encoder="scenes+mobilenetv2")
    given = [*given, "encoder"]
    assert resolve(own, given).encoder_weights == "scenes,random"
    own = dataclasses.replace(own, encoder_weights="random,random")
    assert resolve(own, given).encoder_weights == "random,random"
