"""The decoder: attention, padding, loss, optimizer, and that it can learn."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from captioning.backend import TENSORFLOW, Devices, use_xla
from captioning.data.vocabulary import END, PAD, START, UNKNOWN
from captioning.decoding.search import BeamSearch
from captioning.training.batches import CaptionBatches
from captioning.training.objective import (
    AdamW,
    SmoothedCrossEntropy,
    TokenAccuracy,
    build_optimizer,
)
from config import Config
from model import (
    AttentionLSTM,
    CaptioningModel,
    build_model,
    doubly_stochastic_penalty,
)

pytestmark = pytest.mark.usefixtures("float32")
REGIONS, CHANNELS, SIZE = 9, 6, 12
# Captions of three images, few of them long.
SOME = [
    [(5, 6, 7), (8, 9, 10), (11, 4, 5), (6,), (), (7,)],
    [(9, 5, 8), (4,), (10,), (), (11,), (6,)],
    [(5, 4), (9,), (8,), ()],
]


def tiny(**settings) -> CaptioningModel:
    settings = {
        "decoder_units": 8,
        "attention_units": 7,
        "embedding_units": 6,
        **settings,
    }
    decoder = CaptioningModel(SIZE, **settings)
    decoder.build((None, None, CHANNELS))
    return decoder


def some_features(images: int = 2) -> np.ndarray:
    shape = (images, REGIONS, CHANNELS)
    return np.random.default_rng(3).normal(size=shape).astype("float16")


def batches(captions, features=None, longest=4, **options) -> CaptionBatches:
    """Batches of the captions of each image; all of them are one by default."""
    rows = []
    for each in captions:
        rows.append(np.full((len(each), longest + 2), PAD, np.int32))
        for row, words in zip(rows[-1], each, strict=True):
            row[: len(words) + 2] = [START, *words, END]
    features = some_features(len(rows)) if features is None else features
    options = {"batch_images": len(rows), "static": False, **options}
    return CaptionBatches(features, rows, **options)


# --- one step --------------------------------------------------------------


def step_of(units: int, attention_units: int) -> AttentionLSTM:
    step = AttentionLSTM(units, attention_units)
    step.build()
    return step


def run_step(step, hidden, cell, keys, annotations, word_gates=None):
    if word_gates is None:
        word_gates = np.zeros((len(hidden), 4 * step.units), "float32")
    weights = step.cast_weights()
    found = step(weights, word_gates, hidden, cell, keys, annotations)
    return [np.asarray(each) for each in found]


def test_attention_depends_on_the_state_of_the_decoder():
    step = step_of(8, 7)
    keys = np.random.normal(size=(1, REGIONS, 7)).astype("float32")
    annotations = np.random.normal(size=(1, REGIONS, 8)).astype("float32")
    zeros, ones = np.zeros((1, 8), "float32"), np.ones((1, 8), "float32")
    *_, calm = run_step(step, zeros, zeros, keys, annotations)
    *_, moved = run_step(step, ones, zeros, keys, annotations)
    assert np.abs(calm - moved).max() > 1e-3


@pytest.mark.parametrize("gate", [0.0, 100.0])
def test_attention_finds_the_region_whose_key_fits(gate):
    """What it finds there is the context, less what the gate keeps back."""
    step = step_of(2, 2)
    weights = {each.name: each for each in step.step_weights}
    weights["score"].assign([[4.0], [4.0]])
    weights["query"].assign(np.zeros((2, 2)))
    weights["gate"].assign(np.zeros((2, 2)))
    weights["gate_bias"].assign([gate] * 2)
    keys = np.array([[[-2, -2], [2, 2], [-2, -2]]], "float32")
    annotations = np.array([[[1, 0], [5, 7], [0, 1]]], "float32")
    zeros = np.zeros((1, 2), "float32")
    _, _, context, alpha = run_step(step, zeros, zeros, keys, annotations)
    assert alpha.argmax() == 1
    beta = 1 / (1 + np.exp(-gate))
    np.testing.assert_allclose(context, [[5 * beta, 7 * beta]], atol=0.01)


def test_the_step_is_an_lstm_over_the_word_and_the_context():
    decoder, normal = tiny(), np.random.default_rng(0).normal
    hidden, cell = (normal(size=(3, 8)).astype("float32") for _ in range(2))
    keys = normal(size=(3, REGIONS, 7)).astype("float32")
    annotations = normal(size=(3, REGIONS, 8)).astype("float32")
    word = decoder.embed(np.array([5, 6, 7]))  # (3, 6)
    *found, context, _ = run_step(
        decoder.step,
        hidden,
        cell,
        keys,
        annotations,
        decoder.word_gates(word),
    )
    weights = {each.name: each for each in decoder.step.step_weights}
    lstm = keras.layers.LSTMCell(8)
    lstm.build((None, 6 + 8))
    # Keras, too, begins with an open forget gate.
    np.testing.assert_array_equal(decoder.word_gates.bias, lstm.bias)
    kernel = ops.concatenate([decoder.word_gates.kernel, weights["visual"]])
    lstm.set_weights([kernel, weights["recurrent"], decoder.word_gates.bias])
    seen = ops.concatenate([word, context], axis=-1)
    _, wanted = lstm(seen, [hidden, cell])
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def next_words(decoder, features, words) -> list[np.ndarray]:
    """Log-probabilities of each word after the ones before, as in a search.

    Args:
        decoder: the model.
        features: (images, regions, channels).
        words: (images, hypotheses, steps).

    Returns:
        For each step float32 (images, hypotheses, vocabulary).
    """
    annotations, keys, *state = decoder.start(features)
    weights, found = decoder.step.cast_weights(), []
    state = [ops.repeat(each[:, None], words.shape[1], 1) for each in state]
    for step in range(words.shape[2]):
        each, *state, _ = decoder.next_word(
            words[:, :, step], *state, weights, keys, annotations
        )
        found.append(each)
    return found


def test_the_step_of_a_search_agrees_with_teacher_forcing():
    decoder, features = tiny(embedding_rate=4.0), some_features()
    captions = [[(5, 6, 7), (8, 9, 10)], [(11, 4, 5), (6, 6, 6)]]
    inputs, _, _ = batches(captions, features)[0]
    logits, _ = decoder.teacher_force(inputs)
    forced = ops.reshape(ops.log_softmax(logits), (2, 2, 4, SIZE))
    words = np.reshape(inputs["words"][0], (2, 2, 4))
    assert words[:, :, 0].tolist() == [[START] * 2] * 2
    for step, found in enumerate(next_words(decoder, features, words)):
        np.testing.assert_allclose(found, forced[:, :, step], atol=1e-5)


def test_attention_weights_sum_to_1_for_every_word():
    inputs, targets, _ = batches(SOME)[0]
    logits, attention = tiny().teacher_force(inputs)
    assert logits.shape == (len(targets), SIZE)
    for words, alpha in zip(inputs["words"], attention, strict=True):
        assert alpha.shape == (*words.shape, REGIONS)
        np.testing.assert_allclose(ops.sum(alpha, -1), 1, rtol=1e-5)


def test_outside_of_training_no_bfloat16_rounds_the_logits():
    """In it, the best two of ten thousand words would tie now and then."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    decoder, features = tiny(), some_features(1)
    searcher = BeamSearch(decoder, 3, 0.0, 1, 3)
    searcher.compile(jit_compile=use_xla(), run_eagerly=TENSORFLOW)
    found = searcher.predict_on_batch(features)
    captions = [
        [word for word in words.tolist() if word > END]
        for words in np.asarray(found["words"][0])
    ]
    inputs, targets, weights = batches([captions], features)[0]
    logits = ops.convert_to_numpy(decoder(inputs))
    assert logits.dtype == np.float32
    rounded = ops.cast(ops.cast(logits, "bfloat16"), "float32")
    assert np.mean(logits != ops.convert_to_numpy(rounded)) > 0.9
    # A search has the same ones; where XLA compiles it, its states have more
    # digits than bfloat16 between products that were fused.
    likely = ops.convert_to_numpy(ops.log_softmax(logits))
    likely = likely[np.arange(len(targets)), targets] * weights
    wanted = np.asarray(found["log_probabilities"]).sum()
    if TENSORFLOW:
        assert likely.sum() == pytest.approx(wanted, abs=1e-3)


# --- training --------------------------------------------------------------

# Terraces (captions, steps) of a batch of SOME, padded. Where most captions
# are short, the long ones do not fit into the terraces of a static batch.
SHORT = [[()]] * 300
TERRACES = {
    "static": ({"static": True}, [(18, 2), (14, 1), (12, 1)]),
    "rectangle": ({"static": True, "others": SHORT}, [(18, 4)]),
    "more captions": (
        {"static": True, "captions_per_image": 9},
        [(27, 2), (19, 1), (16, 1)],
    ),
    "more images": (
        {"static": True, "batch_images": 5},
        [(30, 2), (20, 1), (17, 1)],
    ),
    "devices": (
        {"static": True, "devices": Devices(3), "longest": 6},
        [(18, 7)],
    ),
}


def step_of_descent(others=(), **options) -> tuple[list, float, list]:
    """Trains on SOME for a step.

    Returns:
        The shapes of the terraces, the loss, and the new weights.
    """
    keras.utils.set_random_seed(3)
    decoder = tiny(attention_regularisation=1.0)
    decoder.compile(
        keras.optimizers.SGD(1.0),
        SmoothedCrossEntropy(0.1),
        # On TensorFlow a program that runs once is not worth compiling.
        run_eagerly=TENSORFLOW,
    )
    captions = [*SOME, *others]
    options = {"batch_images": len(SOME), **options}
    batch = batches(captions, some_features(len(captions)), **options)[0]
    logs = decoder.train_on_batch(*batch, return_dict=True)
    shapes = [each.shape for each in batch[0]["words"]]
    return shapes, float(logs["loss"]), decoder.get_weights()


@pytest.fixture(scope="module")
def exact() -> tuple[float, list]:
    """The loss and the weights where terraces have no room to spare."""
    keras.config.set_dtype_policy("float32")
    shapes, *found = step_of_descent()
    assert shapes == [(16, 2), (5, 1), (4, 1)]
    return found


@pytest.mark.parametrize("kind", TERRACES)
def test_padding_changes_neither_loss_nor_gradients(kind, exact):
    options, terraces = TERRACES[kind]
    shapes, loss, weights = step_of_descent(**options)
    assert shapes == terraces
    assert loss == pytest.approx(exact[0], rel=1e-5)
    for one, other in zip(weights, exact[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_loss_is_the_mean_over_words_not_over_captions():
    """And without the penalty, which training alone pays."""
    decoder = tiny(attention_regularisation=1.0)
    decoder.compile(loss=SmoothedCrossEntropy(), jit_compile=False)
    inputs, targets, weights = batches([[(5,), (6, 7, 8, 9)]], static=True)[0]
    loss = decoder.test_on_batch(inputs, targets, weights)
    likely = ops.convert_to_numpy(ops.log_softmax(decoder(inputs)))
    chosen = likely[np.arange(len(targets)), targets][weights > 0]
    assert len(chosen) == 2 + 5 < len(targets)
    assert float(loss) == pytest.approx(-chosen.mean(), rel=1e-5)


def test_label_smoothing_is_that_of_keras():
    logits = np.random.normal(size=(4, SIZE)).astype("float32")
    targets = np.array([1, 5, 6, 3])
    kerass = keras.losses.CategoricalCrossentropy(True, label_smoothing=0.2)
    wanted = kerass(np.eye(SIZE)[targets], logits)
    found = SmoothedCrossEntropy(0.2)(targets, logits, np.ones(4))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_an_unknown_word_counts_and_is_never_right():
    logits = np.eye(SIZE, dtype="float32")[[UNKNOWN, 5, 6, 7]]
    targets = np.array([UNKNOWN, 5, 6, 8])
    accuracy = TokenAccuracy()
    accuracy.update_state(targets, logits, np.array([1.0, 1.0, 0.0, 1.0]))
    assert float(accuracy.result()) == pytest.approx(1 / 3)


@pytest.mark.parametrize("cuts", [(), (2,), (1, 4)])
def test_even_attention_is_punished_less_than_staring(cuts):
    """However the steps are cut into terraces; a mean over captions."""
    even = np.eye(REGIONS, dtype="float32")
    staring = np.zeros((REGIONS, REGIONS), "float32")
    staring[:, 0] = 1
    wanted = ((1 - REGIONS) ** 2 + REGIONS - 1) / REGIONS
    for alpha, penalty in ((even, 0), (staring, wanted)):
        # A caption of all steps, one of the first step, and an empty one.
        attention = np.stack([alpha, alpha, alpha])
        words = np.full((3, REGIONS), 5)
        words[1, 1:], words[2] = PAD, PAD
        found = doubly_stochastic_penalty(
            [
                each[: 2 if place else 3]
                for place, each in enumerate(np.split(attention, cuts, 1))
            ],
            [
                each[: 2 if place else 3]
                for place, each in enumerate(np.split(words, cuts, 1))
            ],
        )
        short = (REGIONS - 1) / REGIONS  # a single step sees a single region
        assert float(found) == pytest.approx((penalty + short) / 2, rel=1e-5)


def test_the_optimizer_is_kerass_adamw():
    """Step for step: weights, moments and averages."""
    # No word twice: Keras's norm would count it otherwise than the gradient.
    words = [np.random.permutation(SIZE)[:8].reshape(4, 2) for _ in range(3)]
    targets = np.random.randint(SIZE, size=(3, 4))
    found = []
    for optimizer in (AdamW, keras.optimizers.AdamW):
        keras.utils.set_random_seed(3)
        layers = keras.layers
        network = keras.Sequential(
            [
                layers.Embedding(SIZE, 8),
                layers.Rescaling(300.0),
                layers.Flatten(),
                layers.Dense(SIZE),
            ]
        )
        network.build((None, 2))
        optimizer = optimizer(
            0.1,
            weight_decay=0.1,
            global_clipnorm=0.5,
            use_ema=True,
            ema_momentum=0.8,
        )
        network.compile(optimizer, SmoothedCrossEntropy())
        for one, other in zip(words, targets, strict=True):
            network.train_on_batch(one, other)
        variables = [*network.variables, *optimizer.variables]
        found.append([ops.convert_to_numpy(each) for each in variables])
    assert len(found[0]) > 4 * 3
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_word_embeddings_learn_embedding_rate_times_as_fast():
    """As the decoder sees them. Adam's first step is the learning rate."""
    config = Config(
        embedding_rate=16.0,
        decoder_units=8,
        attention_units=7,
        embedding_units=6,
        word_dropout=0.0,
        output_dropout=0.0,
        weight_decay=0.0,
        clip_norm=0.0,
    )
    inputs, targets, weights = batches(SOME)[0]
    words = np.unique(inputs["words"][0])
    words = words[words != PAD]
    starts = []
    for rate in (1.0, 16.0):
        keras.utils.set_random_seed(3)
        changed = dataclasses.replace(config, embedding_rate=rate)
        decoder = build_model(changed, SIZE, CHANNELS)
        starts.append(ops.convert_to_numpy(decoder.embed(words)))
    np.testing.assert_allclose(*starts, atol=1e-7)
    others = decoder.get_weights()
    decoder.compile(
        build_optimizer(config, 0.001, 1),
        SmoothedCrossEntropy(0.1),
        jit_compile=use_xla(),
    )
    decoder.train_on_batch(inputs, targets, weights)
    moved = ops.convert_to_numpy(decoder.embed(words)) - starts[1]
    np.testing.assert_allclose(np.abs(moved), 16 * 0.001, rtol=0.01)
    for before, after in zip(others, decoder.get_weights(), strict=True):
        assert np.abs(after - before).max() < 1.01 * 0.001


def test_validation_changes_no_weight():
    decoder = tiny(word_dropout=0.5, output_dropout=0.5)
    decoder.compile(loss=SmoothedCrossEntropy(), jit_compile=False)
    before = [np.array(each) for each in decoder.variables]
    decoder.evaluate(batches(SOME), verbose=0)
    for one, other in zip(before, decoder.variables, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_tiny_set_can_be_overfitted():
    features = np.eye(CHANNELS, dtype="float16")[:4, None].repeat(REGIONS, 1)
    captions = [[(4 + n, 8 + n)] for n in range(4)]
    # An epoch has a price of its own.
    often = np.tile(features, (15, 1, 1))
    data = batches(captions * 15, often, batch_images=4, seed=0)
    decoder = tiny(decoder_units=32)
    decoder.compile(
        keras.optimizers.Adam(0.02),
        SmoothedCrossEntropy(),
        weighted_metrics=[TokenAccuracy("token_accuracy")],
        jit_compile=use_xla(),
    )
    decoder.fit(data, epochs=4, verbose=0)
    figures = decoder.evaluate(data, return_dict=True, verbose=0)
    assert figures["token_accuracy"] == 1
    # And by looking: with the images exchanged the words are wrong.
    blind = batches(captions, features[::-1])
    figures = decoder.evaluate(blind, return_dict=True, verbose=0)
    assert figures["token_accuracy"] < 0.5


def test_the_sizes_of_a_config_shape_the_model():
    config = Config(decoder_units=8, attention_units=7, embedding_units=6)
    decoder = build_model(config, SIZE, CHANNELS)
    annotations, keys, hidden, cell = decoder.start(some_features())
    assert annotations.shape == (2, REGIONS, 8)
    assert keys.shape == (2, REGIONS, 7)
    assert hidden.shape == cell.shape == (2, 8)
    assert decoder.embed(np.array([5])).shape == (1, 6)
    assert decoder(batches(SOME)[0][0]).shape[-1] == SIZE
