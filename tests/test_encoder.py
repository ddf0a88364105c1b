"""The frozen encoder: what it takes, what it gives, and of which layer."""

import dataclasses

import keras
import numpy as np
import pytest

from captioning.features import networks
from captioning.features.encoder_weights import describe_features
from captioning.features.extraction import BATCH, encode
from config import Config
from model import build_encoder, feature_shape

pytestmark = pytest.mark.usefixtures("float32")


def random(**fields) -> Config:
    """A ResNet50, or another encoder, with random weights."""
    fields = {"encoder_weights": "random", "magnification": 1, **fields}
    return Config(**{"encoder": "resnet50", **fields})


@pytest.fixture(scope="module")
def small_encoder():
    keras.config.set_dtype_policy("float32")
    config = random(encoder="mobilenetv2", image_size=64)
    return config, build_encoder(config)


def test_the_encoder_is_frozen_and_gives_float16(small_encoder):
    config, encoder = small_encoder
    images = np.random.randint(0, 256, (2, 64, 64, 3), np.uint8)
    found = np.asarray(encoder.predict_on_batch(images))
    assert found.dtype == np.float16
    assert found.shape == (2, *feature_shape(config))
    assert not encoder.trainable_variables
    assert np.abs(found[0] - found[1]).max() > 0


def test_features_do_not_depend_on_the_batch_to_the_last_bit(small_encoder):
    """What makes a cache that was interrupted equal to one that was not."""
    _, encoder = small_encoder
    images = np.random.randint(0, 256, (BATCH, 64, 64, 3), np.uint8)
    whole = np.asarray(encoder.predict_on_batch(images))
    slots = [BATCH - 1, 3, 17]  # whatever else is in the batch
    found = encode(images[slots], encoder.predict_on_batch, slots)
    np.testing.assert_array_equal(found, whole[slots])


def test_the_encoder_preprocesses_rgb_as_keras_applications_does():
    config = random(encoder="vgg16", image_size=32)
    encoder = build_encoder(config)
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[..., 0] = 255  # red, in RGB
    network = keras.applications.VGG16(
        include_top=False, weights=None, input_shape=(32, 32, 3)
    )
    network.set_weights(encoder.get_weights())
    layer = network.get_layer("block5_conv3").output
    # Caffe's VGG wants blue first, less ImageNet's mean.
    pixels = np.array([0 - 103.939, 0 - 116.779, 255 - 123.68], "float32")
    pixels = np.broadcast_to(pixels, (1, 32, 32, 3))
    wanted = np.asarray(keras.Model(network.input, layer)(pixels))
    found = np.asarray(encoder.predict_on_batch(image))
    # Random encoders are scaled by a power of two.
    scale = 2.0 ** np.round(np.log2(wanted.std() / found.std()))
    np.testing.assert_allclose(
        scale * found.reshape(wanted.shape), wanted, rtol=0.01, atol=0.01
    )


def test_activations_beyond_float16_become_the_largest(tmp_path):
    """Some networks have a few, which would be infinite."""
    network = networks.build("scenes")
    network.layers[-1].bias.assign(np.resize([1e6, 1, -1e6], 256))
    path = tmp_path / "large.weights.h5"
    network.save_weights(path)
    config = random(encoder="scenes", image_size=32, encoder_weights=str(path))
    images = np.random.randint(0, 256, (1, 32, 32, 3), np.uint8)
    found = np.asarray(build_encoder(config).predict_on_batch(images))
    assert found.max() == np.finfo(np.float16).max and found.min() == 0


@pytest.mark.parametrize(
    ("encoder", "size", "shape"),
    [
        ("vgg16", 224, (196, 512)),
        ("resnet50", 224, (49, 2048)),
        ("mobilenetv2", 224, (49, 1280)),
        ("scenes", 224, (49, 256)),
    ],
)
def test_the_feature_maps_are_those_of_the_papers(encoder, size, shape):
    config = Config(encoder=encoder, image_size=size, magnification=1)
    assert feature_shape(config) == shape


def test_regions_are_averages_of_squares_of_the_feature_map(small_encoder):
    config, _ = small_encoder
    images = np.random.randint(0, 256, (2, 96, 96, 3), np.uint8)
    plain = dataclasses.replace(config, image_size=96, magnification=1)
    pooled = dataclasses.replace(config, image_size=48, magnification=2)
    whole, averaged = (
        np.asarray(build_encoder(each).predict_on_batch(images))
        for each in (plain, pooled)
    )
    channels = whole.shape[-1]
    grid = whole.astype(np.float32).reshape(2, 3, 3, channels)
    # Of three rows and columns one is left over.
    wanted = np.stack(
        [
            grid[:, rows, columns].mean(axis=(1, 2))
            for rows in (slice(0, 2), slice(2, 3))
            for columns in (slice(0, 2), slice(2, 3))
        ],
        axis=1,
    )
    assert averaged.shape == (2, *feature_shape(pooled)) == wanted.shape
    # The scale of random features depends on what they are.
    scale = np.round(np.log2(wanted.std() / averaged.std()))
    np.testing.assert_allclose(
        2.0**scale * averaged.astype(np.float32), wanted, rtol=0.01, atol=0.01
    )


def test_magnification_makes_other_features_of_one_shape():
    plain, enlarged = random(), random(magnification=2)
    one, other, larger = (
        describe_features(each)[0]
        for each in (plain, enlarged, random(image_size=256))
    )
    assert other == {**one, "magnification": 2}
    assert larger == {**one, "image_size": 256}
    assert feature_shape(plain) == feature_shape(enlarged) == (49, 2048)
