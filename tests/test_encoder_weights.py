"""Weights files of the encoder, of another one, and of none."""

import dataclasses
import functools
from unittest import mock

import h5py
import keras
import numpy as np
import pytest

from captioning.features import encoder_weights, networks
from config import ENCODERS, Config
from tests.helpers import refusal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights files of every kind that people download or save."""
    folder = tmp_path_factory.mktemp("weights")
    network(0).save_weights(folder / "right.weights.h5")
    network(0).save(folder / "right.h5")
    top = keras.applications.MobileNetV2(weights=None, classes=3)
    top.save_weights(folder / "top.weights.h5")
    other = keras.applications.MobileNet(include_top=False, weights=None)
    other.save_weights(folder / "mobilenet.weights.h5")
    whole = (folder / "right.weights.h5").read_bytes()
    (folder / "half.weights.h5").write_bytes(whole[: len(whole) // 2])
    (folder / "text.h5").write_text("no weights")
    with h5py.File(folder / "names.h5", "w") as file:
        file["names"] = ["a", "b"]
    (folder / "new format.h5").write_bytes(whole)
    return folder


@pytest.fixture(scope="module")
def blank() -> keras.Model:
    """A network that tests may give any weights."""
    return keras.applications.MobileNetV2(include_top=False, weights=None)


@functools.cache
def network(seed: int) -> keras.Model:
    """A network that is only read."""
    keras.utils.set_random_seed(seed)
    return keras.applications.MobileNetV2(include_top=False, weights=None)


@pytest.mark.filterwarnings("ignore:You are saving")
@pytest.mark.parametrize("name", ["right.weights.h5", "right.h5"])
def test_a_file_of_the_encoder_is_loaded_in_both_formats(folder, blank, name):
    blank.set_weights(network(1).get_weights())
    encoder_weights.load(blank, str(folder / name), "mobilenetv2")
    for one, other in zip(blank.weights, network(0).weights, strict=True):
        assert np.array_equal(one, other)


def test_weights_are_known_by_their_values_in_half_precision(
    folder, blank, tmp_path
):
    names = ("right.weights.h5", "right.h5")
    files = [str(folder / name) for name in names]
    blank.set_weights([np.float16(each) for each in network(0).get_weights()])
    blank.save_weights(tmp_path / "half.weights.h5")
    files.append(str(tmp_path / "half.weights.h5"))
    found = {encoder_weights.fingerprint("mobilenetv2", x) for x in files}
    assert len(found) == 1
    network(1).save_weights(tmp_path / "other.weights.h5")
    other = str(tmp_path / "other.weights.h5")
    assert encoder_weights.fingerprint("mobilenetv2", other) not in found


def test_the_downloads_of_keras_are_known_by_local_files(real_data):
    for name in ("vgg16", "xception"):
        file = str(real_data / "weights" / f"{name}_notop.weights.h5")
        known = encoder_weights.fingerprint(name, "imagenet")
        assert known == encoder_weights.fingerprint(name, file) != "imagenet"
    assert encoder_weights.fingerprint("resnet50", "imagenet") == "imagenet"


def test_weights_that_keras_has_changed_are_not_taken_for_others(
    blank, monkeypatch
):
    downloaded = network(1)
    entry = ENCODERS["mobilenetv2"]
    known = encoder_weights.digest(network(0).get_weights())
    table = {"mobilenetv2": entry._replace(imagenet=known)}
    monkeypatch.setattr(encoder_weights, "ENCODERS", table)
    monkeypatch.setattr(
        keras.applications, "MobileNetV2", lambda **options: downloaded
    )
    line = refusal(encoder_weights.load, blank, "imagenet", "mobilenetv2")
    assert f", not {known}" in line


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mobilenet.weights.h5", "give the --encoder that they belong to"),
        ("top.weights.h5", "or the file whose name says notop"),
        ("half.weights.h5", "incomplete"),
        ("text.h5", "not a weights file"),
        ("names.h5", "not a weights file"),
        ("new format.h5", "to end in .weights.h5"),
    ],
)
def test_any_other_file_is_named_in_one_line(folder, blank, name, told):
    file = str(folder / name)
    line = refusal(encoder_weights.load, blank, file, "mobilenetv2")
    assert told in line and name in line


def test_random_weights_are_the_same_everywhere():
    """By whatever backend: NumPy draws them."""
    found = networks.build("scenes")
    encoder_weights.load(found, "random", "scenes")
    known = "half-21d99a5134769b0c"
    assert encoder_weights.digest(found.get_weights()) == known


def test_the_weights_for_drawn_scenes_are_shipped():
    found = networks.build("scenes")
    encoder_weights.load(found, "scenes", "scenes")
    known = encoder_weights.fingerprint("scenes", "scenes")
    assert known == encoder_weights.digest(found.get_weights())


@pytest.mark.parametrize(
    ("encoder", "weights", "told"),
    [
        ("vgg16", "scenes", "on drawn scenes: give --encoder scenes"),
        ("scenes", "imagenet", "no ImageNet weights: leave"),
    ],
)
def test_weights_that_an_encoder_does_not_have_are_refused(
    encoder, weights, told
):
    assert told in refusal(encoder_weights.fingerprint, encoder, weights)


def test_other_weights_are_refused_where_the_features_are_cached_too():
    """What is missing then is a file, which `random` is not."""
    config = Config(encoder="vgg16", encoder_weights="random")
    (description,) = encoder_weights.describe_features(config)
    encoder_weights.check(config, [description], needed=False)
    other = {**description, "weights": ENCODERS["vgg16"].imagenet}
    line = refusal(encoder_weights.check, config, [other], needed=False)
    assert "random is random-" in line
    moved = dataclasses.replace(config, encoder_weights="moved.h5")
    encoder_weights.check(moved, [other], needed=False)


def test_a_download_that_fails_without_a_word_is_told(blank, monkeypatch):
    failing = mock.Mock(side_effect=ConnectionResetError)
    monkeypatch.setattr(keras.applications, "MobileNetV2", failing)
    line = refusal(encoder_weights.load, blank, "imagenet", "mobilenetv2")
    assert "downloaded (ConnectionResetError)" in line


def test_a_run_on_another_layer_has_to_be_trained_again():
    config = Config(encoder_weights="random", magnification=1)
    descriptions = encoder_weights.describe_features(config)
    encoder_weights.check(config, descriptions)
    descriptions[0]["layer"] = "conv2_block1_out"
    line = refusal(encoder_weights.check, config, descriptions)
    assert "layer conv2_block1_out" in line and "--fresh" in line
