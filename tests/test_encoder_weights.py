"""Weights files of the encoder, of another one, and of none."""

import h5py
import keras
import numpy as np
import pytest

from captioning.features import encoder_weights
from config import ENCODERS, UserError


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
    vgg19 = keras.applications.VGG19(include_top=False, weights=None)
    with h5py.File(folder / "vgg19.weights.h5", "w") as file:
        for number, weight in enumerate(vgg19.weights):
            file.create_dataset(f"layers/{number}/vars/0", weight.shape)
    whole = (folder / "right.weights.h5").read_bytes()
    (folder / "half.weights.h5").write_bytes(whole[: len(whole) // 2])
    (folder / "text.h5").write_text("no weights")
    (folder / "new format.h5").write_bytes(whole)
    return folder


def network(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return keras.applications.MobileNetV2(include_top=False, weights=None)


@pytest.mark.filterwarnings("ignore:You are saving")
@pytest.mark.parametrize("name", ["right.weights.h5", "right.h5"])
def test_a_file_of_the_encoder_is_loaded_in_both_formats(folder, name):
    loaded, saved = network(1), network(0)
    encoder_weights.load(loaded, str(folder / name), "mobilenetv2")
    for one, other in zip(loaded.weights, saved.weights, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vgg19.weights.h5", "but those of vgg19: give --encoder vgg19"),
        ("mobilenet.weights.h5", "of mobilenetv2, nor those of any other"),
        ("top.weights.h5", "all layers of mobilenetv2 and more"),
        ("half.weights.h5", "incomplete"),
        ("text.h5", "not a weights file"),
        ("new format.h5", r"to end in \.weights\.h5"),
    ],
)
def test_any_other_file_is_named_in_one_line(folder, name, told, monkeypatch):
    few = ("vgg16", "vgg19", "mobilenetv2")  # to build all takes a minute
    some = {name: ENCODERS[name] for name in few}
    monkeypatch.setattr(encoder_weights, "ENCODERS", some)
    with pytest.raises(UserError, match=told) as error:
        encoder_weights.load(network(0), str(folder / name), "mobilenetv2")
    assert name in str(error.value) and "\n" not in str(error.value)
