"""The hyperparameters: their groups, their limits, what is refused."""

import dataclasses
import math

import pytest

from config import ENCODERS, Config, UserError, group

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
