"""The decoder: shapes, attention, padding, loss, and that it can learn."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from captioning.backend import use_xla
from captioning.data.vocabulary import END, PAD, START, UNKNOWN
from captioning.features.extraction import BATCH, encode
from captioning.training.batches import CaptionBatches, pack, pad
from config import Config
from model import (
    AdamW,
    BahdanauAttention,
    CaptioningModel,
    SmoothedCrossEntropy,
    TokenAccuracy,
    build_encoder,
    build_model,
    describe_features,
    doubly_stochastic_penalty,
    feature_shape,
)

REGIONS, CHANNELS, SIZE, STEPS = 9, 6, 12, 5
# XLA would compile for each length of packed captions.
PACKED = not use_xla()


@pytest.fixture(autouse=True)
def float32():
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(1)  # NumPy's too


def tiny(steps: int = STEPS, **settings) -> CaptioningModel:
    settings = {
        "decoder_units": 8,
        "attention_units": 7,
        "embedding_units": 6,
        **settings,
    }
    decoder = CaptioningModel(SIZE, steps, **settings)
    decoder.build({"features": (None, None, CHANNELS)})
    return decoder


def row(*words: int, steps: int = STEPS) -> list[int]:
    made = [START, *words, END]
    return made + [PAD] * (steps + 1 - len(made))


def inputs(features, captions, padded=not PACKED, images=None, number=3):
    """A batch of captions, for each image a list of rows."""
    captions = [np.array(each, np.int32) for each in captions]
    if padded:
        shape = (images or len(captions), number, captions[0].shape[1])
        rows = pad(captions, shape)
        targets = rows[..., 1:]
        given = {"words": np.where(targets != PAD, rows[..., :-1], PAD)}
    else:
        owners = np.repeat(np.arange(len(captions)), [*map(len, captions)])
        given = pack(np.concatenate(captions), owners)._asdict()
        targets, _ = given.pop("targets"), given.pop("order")
    weights = (targets != PAD).astype("float32")
    return {"features": features, **given}, targets, weights


def some_features(images: int = 2) -> np.ndarray:
    shape = (images, REGIONS, CHANNELS)
    return np.random.normal(size=shape).astype("float16")


@pytest.mark.parametrize("padded", [True, False] if PACKED else [True])
def test_decoding_gives_logits_and_attention_for_every_word(padded):
    given, targets, _ = inputs(
        some_features(), [[row(5, 6), row(7)], [row(8, 9, 10)]], padded
    )
    logits, attention = tiny().decode(given)
    assert logits.shape == (*targets.shape, SIZE)
    assert attention.shape == (*targets.shape, REGIONS)
    np.testing.assert_allclose(ops.sum(attention, -1), 1, rtol=1e-5)


def test_attention_depends_on_the_state_of_the_decoder():
    attention = BahdanauAttention(7)
    attention.build((None, 8), (None, REGIONS, 8), (None, REGIONS, 8))
    annotations = np.random.normal(size=(1, REGIONS, 8)).astype("float32")
    keys = attention.key(annotations)
    _, calm = attention(np.zeros((1, 8), "float32"), keys, annotations)
    _, moved = attention(np.ones((1, 8), "float32"), keys, annotations)
    assert np.abs(np.asarray(calm) - np.asarray(moved)).max() > 1e-3


def test_attention_finds_the_region_whose_key_fits():
    attention = BahdanauAttention(2)
    attention.build((None, 2), (None, 3, 2), (None, 3, 2))
    attention.score.assign([[4.0], [4.0]])
    attention.query.kernel.assign(np.zeros((2, 2)))
    keys = np.array([[[-2, -2], [2, 2], [-2, -2]]], "float32")
    annotations = np.array([[[1, 0], [5, 7], [0, 1]]], "float32")
    context, weights = attention(np.zeros((1, 2)), keys, annotations)
    assert int(np.argmax(weights)) == 1
    np.testing.assert_allclose(context, [[5, 7]], atol=0.01)


def test_the_step_of_a_search_agrees_with_teacher_forcing():
    decoder, features = tiny(), some_features(1)
    words = [5, 6, 7]
    given, _, _ = inputs(features, [[row(*words)]], number=1)
    forced, _ = decoder.decode(given)
    forced = ops.reshape(ops.log_softmax(forced), (-1, SIZE))
    annotations, keys, hidden, cell = decoder.start(features)
    for place, word in enumerate([START, *words]):
        found, hidden, cell, _ = decoder.step(
            np.array([word]), hidden, cell, keys, annotations
        )
        np.testing.assert_allclose(found[0], forced[place], atol=1e-5)


def loss_and_gradients(decoder, batch, rate=1.0):
    """The loss, and the weights after a step of plain gradient descent."""
    decoder.compile(
        keras.optimizers.SGD(rate),
        SmoothedCrossEntropy(0.1),
        # On TensorFlow a program that runs once is not worth compiling.
        run_eagerly=PACKED,
    )
    given, targets, weights = batch
    logs = decoder.train_on_batch(given, targets, weights, return_dict=True)
    found = [np.array(each.value) for each in decoder.trainable_variables]
    return float(logs["loss"]), found


def test_padding_changes_neither_loss_nor_gradients():
    features = some_features()
    captions = [[(5, 6), (7,)], [(8, 9, 10)]]
    # Longer captions, more of them an image, more images; and none of it.
    kinds = [(STEPS, 2, 2), (STEPS + 3, 2, 2), (STEPS, 4, 2), (STEPS, 2, 3)]
    found = []
    for steps, number, images in kinds:
        keras.utils.set_random_seed(3)
        decoder = tiny(steps, attention_regularisation=1.0)
        rows = [[row(*c, steps=steps) for c in each] for each in captions]
        shown = np.pad(features, ((0, images - 2), (0, 0), (0, 0)))
        batch = inputs(shown, rows, True, images, number)
        found.append(loss_and_gradients(decoder, batch))
    if PACKED:
        keras.utils.set_random_seed(3)
        decoder = tiny(attention_regularisation=1.0)
        rows = [[row(*c) for c in each] for each in captions]
        batch = inputs(features, rows, False)
        found.append(loss_and_gradients(decoder, batch))
    for loss, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for one, other in zip(weights, found[0][1], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_loss_is_the_mean_over_words_not_over_captions():
    features = some_features(1)
    decoder = tiny()
    captions = [[row(5), row(6, 7, 8, 9)]]
    given, targets, weights = inputs(features, captions)
    logits, _ = decoder.decode(given)
    log_probabilities = np.asarray(ops.log_softmax(logits))
    chosen = np.take_along_axis(log_probabilities, targets[..., None], -1)
    real = weights > 0
    decoder.compile(loss=SmoothedCrossEntropy(), jit_compile=False)
    loss = decoder.compute_loss(given, targets, logits, weights)
    assert real.sum() == 2 + 5
    assert float(loss) == pytest.approx(-chosen[real].mean(), rel=1e-5)


def test_label_smoothing_equals_cross_entropy_with_smoothed_targets():
    logits = np.random.normal(size=(4, SIZE)).astype("float32")
    targets = np.array([1, 5, 6, 3])
    smoothed = np.full((4, SIZE), 0.2 / SIZE)
    smoothed[np.arange(4), targets] += 0.8
    wanted = keras.losses.CategoricalCrossentropy(True, reduction="sum")(
        smoothed, logits
    )
    found = SmoothedCrossEntropy(0.2)(targets, logits, np.ones(4))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_steps_of_training_are_those_of_kerass_own_loss_and_optimizer():
    # No word twice: Keras's norm would count it otherwise than the gradient.
    given = [np.random.permutation(SIZE)[:8].reshape(4, 2) for _ in range(3)]
    targets = np.random.randint(SIZE, size=(3, 4))
    ours = AdamW, SmoothedCrossEntropy(0.2), targets
    loss = keras.losses.CategoricalCrossentropy(
        True, label_smoothing=0.2, reduction="sum"
    )
    plain = keras.optimizers.AdamW, loss, np.eye(SIZE)[targets]
    found = []
    for optimizer, loss, wanted in ours, plain:
        keras.utils.set_random_seed(3)
        layers = keras.layers
        network = keras.Sequential(
            [
                layers.Embedding(SIZE, 8),
                # So large that float32 holds no share of most words.
                layers.Rescaling(300.0),
                layers.Flatten(),
                layers.Dense(SIZE),
            ]
        )
        network.build((None, 2))
        optimizer = optimizer(
            0.1,
            weight_decay=0.1,
            global_clipnorm=50.0,
            use_ema=True,
            ema_momentum=0.8,
        )
        network.compile(optimizer, loss)
        for one, other in zip(given, wanted, strict=True):
            network.train_on_batch(one, other)
        variables = [*network.variables, *optimizer.variables]
        found.append([keras.ops.convert_to_numpy(each) for each in variables])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_embeddings_have_a_learning_rate_of_their_own(decay):
    words = np.arange(6).reshape(3, 2)
    found = []
    for rate in (1.0, 16.0):
        keras.utils.set_random_seed(3)
        layers = keras.layers
        network = keras.Sequential(
            [
                layers.Embedding(SIZE, 8, name="embedding"),
                layers.Flatten(),
                layers.Dense(4),
            ]
        )
        network.build((None, 2))
        before = network.get_weights()
        optimizer = AdamW(0.01, embedding_rate=rate, weight_decay=decay)
        network.compile(optimizer, "mse")
        network.train_on_batch(words, np.ones((3, 4)))
        after = network.get_weights()
        found.append(
            [new - old for new, old in zip(after, before, strict=True)]
        )
    (embedding, *others), (faster, *same) = found
    for one, other in zip(others, same, strict=True):
        np.testing.assert_array_equal(one, other)
    # Adam's first step is the rate; what the weight decays by is not it.
    decayed = -0.01 * decay * before[0]
    np.testing.assert_allclose(
        faster[:6] - decayed[:6], 16 * (embedding - decayed)[:6], atol=1e-4
    )
    np.testing.assert_allclose(faster[6:], decayed[6:], atol=1e-6)


def test_an_unknown_word_counts_and_is_never_right():
    logits = np.eye(SIZE, dtype="float32")[[UNKNOWN, 5, 6, 7]]
    targets = np.array([UNKNOWN, 5, 6, 8])
    accuracy = TokenAccuracy()
    accuracy.update_state(targets, logits, np.array([1.0, 1.0, 0.0, 1.0]))
    assert float(accuracy.result()) == pytest.approx(1 / 3)


def test_top_five_accuracy_counts_what_is_among_the_first_five():
    logits = np.arange(SIZE, dtype="float32")[None].repeat(3, 0)
    accuracy = TokenAccuracy(5)
    targets = np.array([SIZE - 1, SIZE - 5, SIZE - 6])
    accuracy.update_state(targets, logits, np.ones(3))
    assert float(accuracy.result()) == pytest.approx(2 / 3)


def test_even_attention_is_punished_less_than_staring():
    words = np.full(REGIONS, 5, "int32")
    caption = np.zeros(REGIONS, "int32")
    even = np.eye(REGIONS, dtype="float32")
    staring = np.zeros((REGIONS, REGIONS), "float32")
    staring[:, 0] = 1
    penalties = [
        float(doubly_stochastic_penalty(each, words, caption))
        for each in (even, staring)
    ]
    padded = [
        float(doubly_stochastic_penalty(each[None, None], words[None, None]))
        for each in (even, staring)
    ]
    assert padded == pytest.approx(penalties, abs=1e-6)
    assert penalties[0] == pytest.approx(0, abs=1e-6)
    wanted = ((1 - REGIONS) ** 2 + REGIONS - 1) / REGIONS
    assert penalties[1] == pytest.approx(wanted, rel=1e-5)


def test_layers_are_made_again_from_their_config():
    decoder = tiny()
    for layer in (decoder.attention, decoder.cell, decoder.deep_output):
        again = type(layer).from_config(layer.get_config())
        assert again.get_config() == layer.get_config()
    again = CaptioningModel.from_config(decoder.get_config())
    assert again.settings == decoder.settings


def test_validation_changes_no_weight():
    decoder = tiny()
    decoder.compile(loss=SmoothedCrossEntropy(), jit_compile=False)
    before = [np.array(each) for each in decoder.get_weights()]
    decoder.test_on_batch(*inputs(some_features(1), [[row(5, 6)]]))
    for one, other in zip(before, decoder.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_tiny_set_is_learned_by_heart():
    features = np.eye(CHANNELS, dtype="float16")[:4, None].repeat(REGIONS, 1)
    captions = [np.array([row(4 + n, 8 + n)], np.int32) for n in range(4)]
    often = np.tile(np.arange(4), 15)  # an epoch has a price of its own
    batches = CaptionBatches(features, often, captions * 15, 4, 1, seed=0)
    decoder = tiny(decoder_units=32)
    decoder.compile(
        keras.optimizers.Adam(0.02),
        SmoothedCrossEntropy(),
        weighted_metrics=[TokenAccuracy()],
        jit_compile=use_xla(),
    )
    decoder.fit(batches, epochs=4, verbose=0)
    figures = decoder.evaluate(batches, return_dict=True, verbose=0)
    assert figures["token_accuracy"] == 1
    # And by looking: with the images exchanged the words are wrong.
    blind = CaptionBatches(features, np.arange(4)[::-1], captions, 4, 1)
    figures = decoder.evaluate(blind, return_dict=True, verbose=0)
    assert figures["token_accuracy"] < 0.5


def test_the_sizes_of_a_config_shape_the_model():
    config = Config(
        decoder_units=8,
        attention_units=7,
        embedding_units=6,
        max_caption_length=4,
    )
    decoder = build_model(config, SIZE, CHANNELS)
    assert decoder.steps == 5
    assert decoder.embedding.embeddings.shape == (SIZE, 6)
    assert decoder.attention.score.shape == (7, 1)


# --- encoder ---------------------------------------------------------------


@pytest.fixture(scope="module")
def small_encoder():
    keras.config.set_dtype_policy("float32")
    config = Config(encoder="mobilenetv2", image_size=64, magnification=1)
    return config, build_encoder(config, "random")


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
    order = np.random.permutation(BATCH)
    mixed = np.asarray(encoder.predict_on_batch(images[order]))
    np.testing.assert_array_equal(mixed, whole[order])
    found = encode(images[-5:], encoder.predict_on_batch)
    np.testing.assert_array_equal(found, whole[-5:])


def test_random_encoder_weights_are_the_same_every_time(small_encoder):
    config, encoder = small_encoder
    again = build_encoder(config, "random")
    for one, other in zip(
        encoder.get_weights(), again.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_the_encoder_preprocesses_rgb_as_keras_applications_does():
    config = Config(encoder="vgg16", image_size=32, magnification=1)
    encoder = build_encoder(config, "random")
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


@pytest.mark.parametrize("encoder", ["vgg16", "resnet50", "mobilenetv2"])
def test_random_features_fit_into_float16(encoder):
    config = Config(encoder=encoder, image_size=64, magnification=1)
    images = np.random.randint(0, 256, (2, 64, 64, 3), np.uint8)
    found = build_encoder(config, "random").predict_on_batch(images)
    found = np.asarray(found, np.float32)
    # Far from both ends of float16, 6e-8 and 65504.
    assert 0.01 < found.std() < 50
    assert np.abs(found).max() < 10_000


@pytest.mark.parametrize(
    ("encoder", "size", "shape"),
    [
        ("vgg16", 224, (196, 512)),
        ("resnet50", 224, (49, 2048)),
        ("mobilenetv2", 224, (49, 1280)),
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
        np.asarray(build_encoder(each, "random").predict_on_batch(images))
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
    plain, enlarged = Config(magnification=1), Config(magnification=2)
    one, other = (
        describe_features(each, "random") for each in (plain, enlarged)
    )
    assert other == {**one, "magnification": 2}
    assert feature_shape(plain) == feature_shape(enlarged) == (49, 2048)


def test_another_encoder_has_other_features():
    one = describe_features(Config(magnification=1), "random")
    other = describe_features(Config(image_size=256, magnification=1), "random")
    assert one != other
