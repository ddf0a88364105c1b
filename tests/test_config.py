"""The hyperparameters: their groups, their limits, what is refused."""

import dataclasses
import math
import os
from pathlib import Path

import pytest

from config import ENCODERS, OPEN, Config, UserError, group, resolve

FIELDS = dataclasses.fields(Config)
GROUPS = ("place", "data", "encoder", "model", "training", "decoding")


def limited(limit: str) -> list:
    return [
        pytest.param(each.name, each.metadata[limit], id=each.name)
        for each in FIELDS
        if limit in each.metadata
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
    config = Config()
    assert (config.dataset, config.dataset_dir) == ("sample", "")
    assert (config.data_dir, config.checkpoints_dir) == ("data", "checkpoints")
    assert (config.run_name, config.encoder) == ("", "resnet50")
    assert (config.encoder_weights, config.image_size) == ("auto", 224)
    assert (config.min_caption_length, config.split) == (1, "test")
    assert (config.limit_images, config.max_skipped_share) == (0, 0.05)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3


@pytest.mark.parametrize(("name", "least"), limited("least"))
def test_the_least_value_is_accepted_and_one_below_is_refused(name, least):
    assert getattr(Config(**{name: least}), name) == least
    assert (
        refusal(**{name: least - 1}) == f"{name} {least - 1} is below {least}"
    )


@pytest.mark.parametrize(("name", "most"), limited("most"))
def test_one_above_the_greatest_value_is_refused(name, most):
    assert refusal(**{name: most + 1}) == f"{name} {most + 1} is above {most}"


@pytest.mark.parametrize(
    "fields", [{"max_caption_length": 100}, {"image_size": 2048}]
)
def test_the_greatest_value_is_accepted(fields):
    Config(**fields)


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


def test_the_shortest_caption_may_not_be_longer_than_the_longest():
    Config(min_caption_length=7, max_caption_length=7)
    message = refusal(min_caption_length=8, max_caption_length=7)
    assert "min_caption_length 8" in message


def test_something_is_left_to_train_on():
    assert "val_share" in refusal(val_share=0.5, test_share=0.5)


@pytest.mark.parametrize("name", ENCODERS)
def test_each_encoder_is_one_of_keras_applications(name):
    from keras import applications

    encoder = ENCODERS[name]
    assert callable(getattr(applications, encoder.application))
    assert callable(getattr(applications, encoder.module).preprocess_input)


# --- names ----------------------------------------------------------------

BAD_NAMES = [
    *("a/b", "/abs", "a/", "..", "../x", "a\\b", "\\\\host\\x", ".", "..."),
    *("C:", "C:x", "C:\\x", " ", ". .", "a\0b", "a\nb", "a.", "a ", " a"),
    *(".hidden", "con", "NUL", "nul.txt", "Com1", "lpt9.tar.gz", "aux .x"),
    *("a*", "a?", "a|b", "<a>", '"a"', "x" * 121, "\ud800"),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
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


@pytest.mark.parametrize(
    "name",
    [
        *("flickr30k", "my photos", "v1.2", "caf\u00e9 \u72ac", "a+b", "-x"),
        *("nullable", "com10", "a..b", "caches", "console", "x" * 120),
    ],
)
def test_other_names_are_accepted(name):
    config = Config(dataset=name, run_name=name)
    assert resolve(config).run_name == name


# --- choices that are left open -------------------------------------------


def test_a_resolved_config_leaves_only_the_machine_a_choice():
    for dataset in ("sample", "mine"):
        config = resolve(Config(dataset=dataset))
        left = {n for n, value in OPEN.items() if getattr(config, n) == value}
        assert left == {"precision"}
        assert resolve(config) == config


def test_photographs_are_enlarged_and_the_sample_is_not():
    assert resolve(Config()).input_size == 224
    assert resolve(Config(dataset="flickr8k")).input_size == 448
    config = Config(dataset="flickr8k", magnification=1)
    assert resolve(config).input_size == 224
    assert Config(magnification=3, image_size=32).input_size == 96


def test_the_sample_is_learnt_in_smaller_steps():
    sample, other = resolve(Config()), resolve(Config(dataset="flickr8k"))
    assert sample.batch_images < other.batch_images
    for dataset in ("sample", "flickr8k"):
        config = Config(dataset=dataset, batch_images=3)
        assert resolve(config).batch_images == 3


def test_the_sample_has_random_weights_unless_told_otherwise():
    assert resolve(Config()).encoder_weights == "random"
    assert resolve(Config(dataset="mine")).encoder_weights == "imagenet"
    for weights in ("imagenet", "random", "w.h5"):
        config = resolve(Config(encoder_weights=weights))
        assert config.encoder_weights == weights


# --- dataset_dir ----------------------------------------------------------


def test_dataset_dir_alone_names_the_dataset(tmp_path, monkeypatch):
    (tmp_path / "farm" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "farm")
    for folder in (".", "../farm", "inner/..", str(tmp_path / "farm") + "/"):
        config = resolve(Config(dataset_dir=folder), ["dataset_dir"])
        assert (config.dataset, config.run_name) == ("farm", "farm-resnet50")
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


@pytest.mark.parametrize("given", [[], ["dataset_dir"], ["dataset"]])
def test_photographs_are_not_called_like_the_sample(given):
    """Whose encoder has random weights."""
    with pytest.raises(UserError, match="the built-in sample"):
        resolve(Config(dataset_dir="elsewhere/sample"), given)
    own = Config(dataset_dir=str(Path("data") / "sample"))
    assert resolve(own, given).encoder_weights == "random"
