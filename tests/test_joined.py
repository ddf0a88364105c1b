"""Several encoders as one: their features, joined by channel."""

import numpy as np
import pytest

from captioning.features.joined import Features, averages
from config import Config, each_encoder, resolve
from model import build_encoder, feature_shape
from tests.helpers import refusal

pytestmark = pytest.mark.usefixtures("float32")
# One of each family, small.
FAMILIES = (
    "vgg16 resnet50 xception mobilenetv2 "
    "resnet50v2 efficientnetv2b0 convnexttiny"
).split()
PAIR = "vgg16+mobilenetv2"  # 4x4 and 2x2 regions of 64 pixels


def random(**fields) -> Config:
    fields = {"image_size": 64, "magnification": 1, **fields}
    return Config(encoder_weights="random", **fields)


def some_images(number: int, size: int = 64) -> np.ndarray:
    shape = (number, size, size, 3)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_encoders_are_joined_by_channel():
    random_ = np.random.default_rng(0)
    shapes = (5, 4, 3), (9, 4, 2)
    arrays = [random_.normal(size=s).astype(np.float16) for s in shapes]
    rows = [np.array([4, 0, 2]), np.array([8, 7, 0])]
    joined = Features(arrays, rows)
    assert joined.shape == (3, 4, 5) and len(joined) == 3
    found = joined[np.array([2, 0])]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found[..., :3], arrays[0][[2, 4]])
    np.testing.assert_array_equal(found[..., 3:], arrays[1][[0, 8]])
    (chosen,) = joined.select(np.array([1]))[np.array([0])]
    np.testing.assert_array_equal(chosen[:, 3:], arrays[1][7])


def test_a_finer_grid_is_averaged_over_the_coarser_one():
    fine = np.arange(16, dtype=np.float16).reshape(1, 16, 1)
    joined = Features([fine, fine[:, :4]], [np.array([0])] * 2)
    found = joined[np.array([0])][0]  # (regions, channels)
    squares = fine.reshape(2, 2, 2, 2).mean((1, 3)).ravel()
    np.testing.assert_array_equal(found[:, 0], squares)
    # Where a side does not divide, a region counts by how much is covered.
    matrix = averages(9, 4)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        matrix[0], np.outer([4, 2, 0], [4, 2, 0]).ravel() / 36, rtol=1e-6
    )


def test_a_pair_encodes_as_its_cached_features_are_joined():
    images = some_images(2)
    pair = random(encoder=PAIR)
    found = np.asarray(build_encoder(pair).predict_on_batch(images))
    assert found.shape == (2, *feature_shape(pair)) == (2, 4, 512 + 1280)
    cached = [
        np.asarray(build_encoder(random(encoder=e)).predict_on_batch(images))
        for e in PAIR.split("+")
    ]
    joined = Features(cached, [np.arange(2)] * 2)[np.arange(2)]
    np.testing.assert_allclose(
        found.astype(np.float32),
        joined.astype(np.float32),
        rtol=2e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_encoders_works(name):
    """Its enlarged map has the regions of the plain one, and fits float16."""
    plain = random(encoder=name, image_size=96)
    enlarged = random(encoder=name, image_size=96, magnification=2)
    images = some_images(2, enlarged.input_size)
    found = np.asarray(build_encoder(enlarged).predict_on_batch(images))
    assert found.shape[1:] == feature_shape(enlarged) == feature_shape(plain)
    # Far from both ends of float16, 6e-8 and 65504.
    assert 1e-3 < found.astype(float).std() < 50
    assert np.abs(found).max() < 10_000
    assert np.abs(found[0] - found[1]).max() > 0


def test_images_that_are_too_small_for_an_encoder_are_refused():
    line = refusal(feature_shape, random(encoder="xception"))
    assert "xception" in line and "71x71" in line


def test_weights_are_given_for_all_encoders_or_for_each():
    def weights(text: str, encoder: str = PAIR) -> list[str]:
        config = resolve(
            Config(dataset="x", encoder=encoder, encoder_weights=text)
        )
        return [each for _, each in each_encoder(config)]

    assert weights("auto") == ["imagenet"] * 2
    assert weights("a.h5,auto") == ["a.h5", "imagenet"]
    assert weights("a,b.h5", encoder="vgg16") == ["a,b.h5"]
    assert "lists 3 for 2 encoders" in refusal(weights, "a,b,c")


@pytest.mark.parametrize("encoder", ["vgg16+vgg16", "vgg16+", "vgg16+none", ""])
def test_encoders_that_do_not_exist_are_refused(encoder):
    assert "encoder" in refusal(Config, encoder=encoder)
