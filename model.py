"""The Keras model: frozen encoder, Bahdanau attention, LSTM decoder.

The architecture is that of Show, Attend and Tell (Xu et al. 2015) with soft
attention. What does not depend on the decoder's state is computed outside of
the loop over words: attention keys once an image, however many captions it
has; the word's part of the LSTM input and the output layer as one matrix
product each, over all words of all captions.

Only `keras` is imported, so that every backend runs the same code.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from captioning import runs
from captioning.backend import (
    TENSORFLOW,
    adamw_step,
    clip_by_global_norm,
    largest,
    over_devices,
    scan,
    split_steps,
    use_xla,
)
from captioning.data import vocabulary
from captioning.data.vocabulary import PAD, START, UNKNOWN
from captioning.decoding import search
from captioning.features import cache as features
from captioning.features import encoder_weights as encoder_file
from captioning.training import gradients
from config import ENCODERS, Config, UserError

# Seeds of their own, so that --seed changes the training and neither the
# encoder nor, with it, the feature cache.
RANDOM_ENCODER_SEED = 0

# What each step of the unrolled loop hands to the output layer.
Steps = list[Any]


# --- encoder ---------------------------------------------------------------


def build_encoder(config: Config, weights: str) -> keras.Model:
    """Builds the frozen encoder.

    Args:
        config: its encoder fields name the network and the image size.
        weights: `imagenet`, `random`, or the path of a weights file.

    Returns:
        A model from uint8 RGB images (batch, size, size, 3), where size is
        `config.input_size`, to annotation vectors, float16 (batch, regions,
        channels).

    Raises:
        UserError: if the weights cannot be had or do not fit.
    """
    application, network, truncated = _networks(config)
    network.trainable = False
    _load_encoder_weights(network, application, config.encoder, weights)

    module = getattr(keras.applications, ENCODERS[config.encoder].module)
    shape = network.input_shape[1:]
    images = keras.Input(shape, dtype="uint8", name="images")
    pixels = module.preprocess_input(ops.cast(images, "float32"))
    feature_map = truncated(pixels, training=False)  # (batch, h, w, channels)
    _, height, width, channels = feature_map.shape
    annotations = ops.reshape(feature_map, (-1, height * width, channels))
    # float16 ends at 65,504; an activation beyond it would become infinite.
    annotations = ops.cast(annotations, "float32")
    if weights == "random":
        annotations = annotations / _size_of_response(truncated)
    annotations = ops.clip(annotations, -65504, 65504)
    encoder = keras.Model(images, ops.cast(annotations, "float16"))
    encoder.compile(jit_compile=use_xla())
    return encoder


def _networks(config: Config) -> tuple[Any, keras.Model, keras.Model]:
    """A network of Keras Applications, its weights still to be loaded.

    Returns:
        What makes the network; the network; and the part of it that gives the
        feature map (batch, height, width, channels). Squares of the map of an
        enlarged image are averaged, so that it has no more regions than one
        that is not; where it does not divide, the last squares are what is
        left.
    """
    entry = ENCODERS[config.encoder]
    application = getattr(keras.applications, entry.application)
    shape = (config.input_size, config.input_size, 3)
    network = application(include_top=False, weights=None, input_shape=shape)
    feature_map = network.get_layer(entry.layer).output
    if config.enlarged > 1:
        pooling = keras.layers.AveragePooling2D(config.enlarged, padding="same")
        feature_map = pooling(feature_map)
    return application, network, keras.Model(network.input, feature_map)


def feature_shape(config: Config) -> tuple[int, int]:
    """(regions, channels) of an encoder, from the network without weights."""
    _, _, truncated = _networks(config)
    _, height, width, channels = truncated.output_shape
    return height * width, channels


def describe_features(config: Config, weights: str) -> dict[str, Any]:
    """What the features of a config depend on, for `captioning.features.cache`.

    Args:
        config: its encoder fields.
        weights: `imagenet`, `random`, or the path of a weights file.
    """
    return features.describe(
        config.encoder,
        ENCODERS[config.encoder].layer,
        weights_fingerprint(weights),
        config.image_size,
        config.enlarged,
    )


def encoder_weights(config: Config) -> str:
    """Which weights the encoder has: `imagenet`, `random` or a path."""
    if config.encoder_weights != "auto":
        return config.encoder_weights
    return "random" if config.dataset == "sample" else "imagenet"


def weights_fingerprint(weights: str) -> str:
    """A short name for encoder weights that another file cannot have.

    Args:
        weights: `imagenet`, `random`, or the path of a weights file.

    Raises:
        UserError: if there is no such file.
    """
    if weights == "random":
        return f"random-{RANDOM_ENCODER_SEED}"
    if weights == "imagenet":
        return weights
    try:
        with open(weights, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256")
    except OSError as error:
        raise UserError(
            f"encoder weights {weights}: {error.strerror}; --encoder-weights "
            "takes imagenet, random or the path of a weights file"
        ) from None
    return f"sha256-{digest.hexdigest()[:16]}"


def check_weights(config: Config, description: dict[str, Any]) -> str:
    """Holds the encoder weights at hand against those of a run.

    Args:
        config: its encoder fields.
        description: from `runs.load_features`.

    Returns:
        The weights: `imagenet`, `random` or a path.

    Raises:
        UserError: if they are not the ones that the run was trained with.
    """
    weights = encoder_weights(config)
    found = weights_fingerprint(weights)
    if found != description["weights"]:
        raise UserError(
            f"the run was trained with the encoder weights "
            f"{description['weights']}, and {weights} is {found}: give the "
            "same file by --encoder-weights"
        )
    return weights


def _load_encoder_weights(
    network: keras.Model, application: Any, name: str, weights: str
) -> None:
    if weights == "random":
        _draw_weights(network)
        return
    if weights == "imagenet":
        try:
            shape = network.input_shape[1:]
            trained = application(include_top=False, input_shape=shape)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the ImageNet weights of {name} could not be downloaded "
                f"({reason}): get the file elsewhere and give its path by "
                "--encoder-weights"
            ) from None
        network.set_weights(trained.get_weights())
        return
    encoder_file.load(network, weights, name)


def _size_of_response(network: keras.Model) -> float:
    """How large the numbers are by which random filters answer to noise.

    Without trained normalisation they grow or shrink from layer to layer, in
    deep networks beyond what float16 holds. A power of two, so that rounding,
    which differs between backends, does not matter.
    """
    generator = np.random.default_rng(RANDOM_ENCODER_SEED)
    noise = generator.normal(0, 100, (1, *network.input_shape[1:]))
    response = np.asarray(network(noise.astype("float32"), training=False))
    return 2.0 ** round(float(np.log2(np.std(response.astype("float32")))))


def _draw_weights(network: keras.Model) -> None:
    """Glorot-normal kernels from NumPy, the same on every backend.

    With these the shortcuts of residual networks outweigh the filters beside
    them, so that more of the image is left in the last layer.
    """
    generator = np.random.default_rng(RANDOM_ENCODER_SEED)
    drawn = []
    for variable in network.weights:
        shape = variable.shape
        if len(shape) > 1:
            area = np.prod(shape[:-2])  # of the filter, in pixels
            # A depthwise filter, (height, width, channels, 1), has one input.
            ends = 2 if shape[-1] == 1 else shape[-2] + shape[-1]
            scale = np.sqrt(2 / (area * ends))
            drawn.append(generator.normal(0, scale, shape))
        else:
            ones = variable.name in ("gamma", "moving_variance")
            drawn.append(np.full(shape, float(ones)))
    network.set_weights(drawn)


# --- decoder ---------------------------------------------------------------


def _sum(parts: Iterable[Any]) -> Any:
    """Sums products in float32: bfloat16 would round at every addition."""
    return sum(ops.cast(each, "float32") for each in parts)


@keras.saving.register_keras_serializable("captioning")
class FeatureStandardisation(keras.layers.Layer):
    """Shifts and scales features to mean 0 and variance 1 a channel.

    Encoders differ in scale by a factor of twenty. The statistics are those
    of the training split; they are weights that no gradient changes, so that
    they travel with the run.
    """

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Makes the statistics for (batch, regions, channels)."""
        statistic = {"shape": (shape[-1],), "trainable": False}
        self.mean = self.add_weight(
            name="mean", initializer="zeros", dtype="float32", **statistic
        )
        self.deviation = self.add_weight(
            name="deviation", initializer="ones", dtype="float32", **statistic
        )

    def call(self, features: Any) -> Any:
        """Standardises (batch, regions, channels)."""
        features = ops.cast(features, "float32")
        standardised = (features - self.mean) / self.deviation
        return ops.cast(standardised, self.compute_dtype)


@keras.saving.register_keras_serializable("captioning")
class BahdanauAttention(keras.layers.Layer):
    """Additive attention: which regions matter for the next word.

    e_i = v . tanh(W_h h + W_a a_i), alpha = softmax(e), z = sum alpha_i a_i
    (Bahdanau et al. 2015, appendix A.1.2; Xu et al. 2015, equations 4-6 and
    13). W_a a_i, the key of region i, does not depend on the state h.

    Args:
        units: width of keys and queries.
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.units = units
        self.key = keras.layers.Dense(units, name="key")
        self.query = keras.layers.Dense(units, use_bias=False, name="query")

    def build(
        self,
        state: tuple[int | None, ...],
        keys: tuple[int | None, ...],
        annotations: tuple[int | None, ...],
    ) -> None:
        """Makes the weights."""
        self.key.build(annotations)
        self.query.build(state)
        self.score = self.add_weight(
            name="score", shape=(self.units, 1), initializer="glorot_uniform"
        )

    def call(self, state: Any, keys: Any, annotations: Any) -> Any:
        """Attends.

        Args:
            state: h, (..., decoder units).
            keys: (..., regions, units), from `key`.
            annotations: (..., regions, decoder units).

        Returns:
            The context z (..., decoder units) and the attention weights
            alpha, float32 (..., regions). Leading dimensions are captions, or
            images and hypotheses, and are broadcast.
        """
        return self.attend(self.query(state), keys, annotations)

    def attend(self, query: Any, keys: Any, annotations: Any) -> Any:
        """Like `call`, by a query (..., units)."""
        # Sum and tanh in float32: no slower on a CPU, and a softmax over
        # bfloat16 scores loses what tells regions apart.
        query = ops.cast(query, "float32")
        energy = ops.cast(keys, "float32") + ops.expand_dims(query, -2)
        score = ops.cast(self.score, "float32")
        scores = ops.matmul(ops.tanh(energy), score)  # (..., regions, 1)
        weights = ops.softmax(ops.squeeze(scores, -1))
        row = ops.expand_dims(ops.cast(weights, annotations.dtype), -2)
        return ops.squeeze(ops.matmul(row, annotations), -2), weights

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("captioning")
class ContextGate(keras.layers.Layer):
    """The gate beta = sigmoid(W_b h) by which the decoder weighs the image.

    Words like "of" need no look at the image (Xu et al. 2015, section 4.2.1,
    where beta is one number; here it is one a channel).
    """

    def build(
        self, state: tuple[int | None, ...], context: tuple[int | None, ...]
    ) -> None:
        """Makes the weights."""
        self.beta = keras.layers.Dense(
            context[-1], activation="sigmoid", name="beta"
        )
        self.beta.build(state)

    def call(self, state: Any, context: Any) -> Any:
        """Gates a context (..., units) by a state (..., units)."""
        return self.beta(state) * context


@keras.saving.register_keras_serializable("captioning")
class InitialState(keras.layers.Layer):
    """h_0 and c_0 from the mean annotation vector (Xu et al. 2015, 3.1.2).

    Args:
        units: width of the decoder's state.
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.hidden = keras.layers.Dense(units, "tanh", name="hidden")
        self.cell = keras.layers.Dense(units, "tanh", name="cell")

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Makes the weights."""
        self.hidden.build((shape[0], shape[-1]))
        self.cell.build((shape[0], shape[-1]))

    def call(self, annotations: Any) -> Any:
        """Annotations (images, regions, units) -> h, c (images, units)."""
        mean = ops.mean(annotations, axis=1)
        return self.hidden(mean), ops.cast(self.cell(mean), "float32")

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("captioning")
class AttentionLSTMCell(keras.layers.Layer):
    """An LSTM step over word, state and context (Xu et al. 2015, eq. 1-3).

    The word's part of the gates comes ready-made, because all words of a
    caption are known in training and one large product is faster than many
    small ones.

    Args:
        units: width of the state.
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.units = units
        self.word_gates = keras.layers.Dense(4 * units, name="word_gates")
        self.recurrent = keras.layers.Dense(
            4 * units,
            use_bias=False,
            kernel_initializer="orthogonal",
            name="recurrent",
        )
        self.visual = keras.layers.Dense(
            4 * units, use_bias=False, name="visual"
        )

    def build(
        self,
        word: tuple[int | None, ...],
        hidden: tuple[int | None, ...],
    ) -> None:
        """Makes the weights."""
        self.word_gates.build(word)
        self.recurrent.build(hidden)
        self.visual.build(hidden)
        # An open forget gate lets gradients through from the first step
        # (Jozefowicz et al. 2015).
        bias = np.zeros(4 * self.units, np.float32)
        bias[self.units : 2 * self.units] = 1
        self.word_gates.bias.assign(bias)

    def call(self, gates: Any, hidden: Any, cell: Any, context: Any) -> Any:
        """One step.

        Args:
            gates: the word's part, from `word_gates` (..., 4 * units).
            hidden: h (..., units).
            cell: c, float32 (..., units).
            context: the gated context (..., units).

        Returns:
            The next h, in the layers' arithmetic, and the next c, float32.
        """
        gates = _sum((gates, self.recurrent(hidden), self.visual(context)))
        hidden_next, cell = self.advance(gates, cell)
        return ops.cast(hidden_next, hidden.dtype), cell

    def advance(self, gates: Any, cell: Any) -> Any:
        """Like `call`, by all parts of the gates, float32; so are h and c."""
        enter, forget, candidate, leave = ops.split(gates, 4, axis=-1)
        cell = ops.sigmoid(forget) * cell
        cell = cell + ops.sigmoid(enter) * ops.tanh(candidate)
        return ops.sigmoid(leave) * ops.tanh(cell), cell

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("captioning")
class DeepOutput(keras.layers.Layer):
    """Scores of the next word from word, state and context.

    L_o (E y + L_h h + L_z z) (Xu et al. 2015, equation 7), with dropout
    before L_o.

    Args:
        vocabulary_size: how many words there are.
        units: width of the word embedding.
        dropout: rate.
    """

    def __init__(
        self, vocabulary_size: int, units: int, dropout: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.vocabulary_size, self.units = vocabulary_size, units
        self.rate = dropout
        self.state = keras.layers.Dense(units, name="state")
        self.context = keras.layers.Dense(units, use_bias=False, name="context")
        self.dropout = keras.layers.Dropout(dropout)
        self.logits = keras.layers.Dense(vocabulary_size, name="logits")

    def build(
        self,
        word: tuple[int | None, ...],
        hidden: tuple[int | None, ...],
        context: tuple[int | None, ...],
    ) -> None:
        """Makes the weights."""
        self.state.build(hidden)
        self.context.build(context)
        self.logits.build(word)

    def call(
        self, word: Any, hidden: Any, context: Any, training: bool = False
    ) -> Any:
        """(..., units) each -> logits (..., vocabulary)."""
        deep = _sum((word, self.state(hidden), self.context(context)))
        deep = ops.cast(deep, self.compute_dtype)
        return self.logits(self.dropout(deep, training=training))

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "units": self.units,
            "dropout": self.rate,
        }


class TeacherForced(keras.Model):
    """A model that scores the next word, given the true words before it.

    Its loss is a mean over the words of a batch, and that of an epoch one
    over the words of the epoch. Keras would take the mean of what each device
    finds of its part of a batch, and of what it finds of each batch, whether
    that has many words or few.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Takes the place of Keras's own figure of this name.
        self.mean_loss = keras.metrics.Mean(name="loss")

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """This device's part of the loss of a batch.

        Losses are sums over words, additional ones sums over captions; both
        are divided by what all devices have of them.

        Args:
            x: inputs, see `CaptioningModel.call`.
            y: targets, int32 (tokens,) or (images, captions, steps).
            y_pred: logits, of one dimension more.
            sample_weight: float32, of the shape of the targets.
            training: has no effect.
        """
        # Before the devices are asked: each of them adds to the same list.
        penalties = self.losses
        loss = self.loss(y, y_pred, sample_weight)
        counted = (y != PAD, x["words"] == START)
        words, captions = over_devices(
            [ops.sum(ops.cast(each, "float32")) for each in counted]
        )
        loss = loss / words
        for penalty in penalties:
            loss = loss + penalty / captions
        self.mean_loss.update_state(over_devices(loss), words)
        return loss

    def _maybe_symbolic_build(self, **_: Any) -> None:
        """Leaves out what Keras does before an epoch on several devices.

        It reads a first batch to build the model by, and what was read ahead
        of that one comes first in the epoch. This model is built.
        """


@keras.saving.register_keras_serializable("captioning")
class CaptioningModel(TeacherForced):
    """The decoder over cached features, for training and, by step, search.

    Args:
        vocabulary_size: how many words there are, special ones included.
        steps: the longest caption, in words with its `<end>`.
        decoder_units: width of the state and of the annotation vectors.
        attention_units: width of keys and queries.
        embedding_units: width of the word embedding.
        word_dropout: rate on embeddings and annotation vectors.
        output_dropout: rate before the output layer.
        attention_regularisation: weight of the doubly stochastic penalty.
    """

    def __init__(
        self,
        vocabulary_size: int,
        steps: int,
        decoder_units: int,
        attention_units: int,
        embedding_units: int,
        word_dropout: float = 0.0,
        output_dropout: float = 0.0,
        attention_regularisation: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings = {
            "vocabulary_size": vocabulary_size,
            "steps": steps,
            "decoder_units": decoder_units,
            "attention_units": attention_units,
            "embedding_units": embedding_units,
            "word_dropout": word_dropout,
            "output_dropout": output_dropout,
            "attention_regularisation": attention_regularisation,
        }
        self.steps = steps
        self.penalty = attention_regularisation
        self.standardisation = FeatureStandardisation()
        self.annotation = keras.layers.Dense(
            decoder_units, "relu", name="annotation"
        )
        self.annotation_dropout = keras.layers.Dropout(word_dropout)
        self.embedding = keras.layers.Embedding(
            vocabulary_size, embedding_units, name="embedding"
        )
        self.word_dropout = keras.layers.Dropout(word_dropout)
        self.initial_state = InitialState(decoder_units)
        self.attention = BahdanauAttention(attention_units)
        self.gate = ContextGate()
        self.cell = AttentionLSTMCell(decoder_units)
        self.deep_output = DeepOutput(
            vocabulary_size, embedding_units, output_dropout
        )

    def build(self, shapes: dict[str, tuple[int | None, ...]]) -> None:
        """Makes all weights, for features of so many channels."""
        features = shapes["features"]
        units = self.settings["decoder_units"]
        embedding = (None, self.settings["embedding_units"])
        state, annotations = (None, units), (*features[:2], units)
        self.standardisation.build(features)
        self.annotation.build(features)
        self.embedding.build((None,))
        self.initial_state.build(annotations)
        self.attention.build(state, annotations, annotations)
        self.gate.build(state, state)
        self.cell.build(embedding, state)
        self.deep_output.build(embedding, state, state)
        self.built = True

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        """Scores every next word, given the true words before it.

        Args:
            inputs: `features` (images, regions, channels) and packed
                captions (`captioning.training.batches.pack`): `words`, `image`,
                `caption`, int32 (tokens,), and `counts`, int32 (steps,); or
                padded ones, `words`, int32 (images, captions, steps), alone.
            training: whether to drop out.

        Returns:
            Logits (tokens, vocabulary), or (images, captions, steps,
            vocabulary).
        """
        logits, attention = self.decode(inputs, training)
        if training and self.penalty:
            penalty = doubly_stochastic_penalty(
                attention, inputs["words"], inputs.get("caption")
            )
            self.add_loss(self.penalty * penalty)
        return logits

    def decode(self, inputs: dict[str, Any], training: bool = False) -> Any:
        """Like `call`; also gives the attention weights.

        Returns:
            Logits, see `call`, and attention weights, float32 (tokens,
            regions) or (images, captions, steps, regions).
        """
        if "caption" not in inputs:
            return self.decode_padded(inputs, training)
        words, image, counts = (
            inputs[name] for name in ("words", "image", "counts")
        )
        annotations, keys, hidden, cell = self.start(
            inputs["features"], training
        )
        embedded = self.embedding(words)  # (tokens, embedding)
        embedded = self.word_dropout(embedded, training=training)
        word_gates = self.cell.word_gates(embedded)  # (tokens, 4 * units)
        given, of_state, of_context = self.loop_kernels(word_gates)
        first = image[: counts[0]]
        hidden = ops.take(hidden, first, axis=0)  # (captions, units)
        cell = ops.take(cell, first, axis=0)
        # Once an image, not once a word: the attention adds in float32.
        keys = ops.cast(keys, "float32")
        owner = image[:, None] == ops.arange(ops.shape(keys)[0])
        widths = (self.attention.units, hidden.shape[-1])
        ends = np.cumsum(widths).tolist()  # of query and context gate
        hiddens, contexts, weights = [], [], []
        packed = (given, image, owner)
        steps = (split_steps(each, counts, self.steps) for each in packed)
        for step, (given, shown, owned) in enumerate(zip(*steps, strict=True)):
            # The captions that have not ended stand first. (The gradient of
            # an index would be the slower one.)
            going = (counts[step], hidden.shape[-1])
            hidden = ops.slice(hidden, (0, 0), going)
            cell = ops.slice(cell, (0, 0), going)
            from_state = _sum((given, of_state(hidden)))
            query, beta, gates = ops.split(from_state, ends, axis=-1)
            context, alpha = self.attention.attend(
                query,
                gradients.of_image(keys, shown, owned),
                gradients.of_image(annotations, shown, owned),
            )
            context = ops.cast(ops.sigmoid(beta), context.dtype) * context
            gates = _sum((gates, of_context(context)))
            hidden, cell = self.cell.advance(gates, cell)
            hidden = ops.cast(hidden, context.dtype)
            hiddens.append(hidden)
            contexts.append(context)
            weights.append(alpha)
        logits = self.deep_output(
            embedded,
            ops.concatenate(hiddens),  # (tokens, units)
            ops.concatenate(contexts),
            training=training,
        )
        return logits, ops.concatenate(weights)

    def loop_kernels(self, word_gates: Any) -> tuple[Any, Any, Any]:
        """The layers' kernels as the loop over packed captions takes them.

        Args:
            word_gates: (tokens, 4 * units).

        Returns:
            What each step adds to the products of its state, (tokens,
            attention units + 5 * units): nothing for the query, the bias for
            the context gate, and the word gates; and the kernels of the state
            and of the context.
        """
        dtype = word_gates.dtype
        bias = ops.cast(self.gate.beta.bias, dtype)
        before, after = self.attention.units, word_gates.shape[-1]
        left = before + bias.shape[0]
        given = ops.pad(word_gates, ((0, 0), (left, 0)))
        given = given + ops.pad(bias, (before, after))
        state = (self.attention.query, self.gate.beta, self.cell.recurrent)
        kernels = [ops.cast(each.kernel, dtype) for each in state]
        of_state = gradients.LoopKernel(ops.concatenate(kernels, axis=-1))
        of_context = gradients.LoopKernel(
            ops.cast(self.cell.visual.kernel, dtype)
        )
        given = of_context.before(of_state.before(given))
        return given, of_state, of_context

    def decode_padded(
        self, inputs: dict[str, Any], training: bool = False
    ) -> Any:
        """Like `decode`, of padded captions.

        All batches have one size, and an image's part of the batch is its
        own, so that devices can share the images.
        """
        words = inputs["words"]  # (images, captions, steps)
        annotations, keys, hidden, cell = self.start(
            inputs["features"], training
        )
        # The regions of an image are there once for all of its captions.
        annotations = ops.expand_dims(annotations, 1)
        keys = ops.cast(ops.expand_dims(keys, 1), "float32")
        embedded = self.embedding(words)  # (images, captions, steps, units)
        embedded = self.word_dropout(embedded, training=training)
        word_gates = self.cell.word_gates(embedded)
        hidden, cell = (
            ops.repeat(ops.expand_dims(each, 1), words.shape[1], axis=1)
            for each in (hidden, cell)
        )  # (images, captions, units)

        def step(state: Any, gates: Any) -> Any:
            hidden, cell = state
            context, alpha = self.attention(hidden, keys, annotations)
            context = self.gate(hidden, context)
            hidden, cell = self.cell(gates, hidden, cell, context)
            return (hidden, cell), (hidden, context, alpha)

        gates = ops.moveaxis(word_gates, 2, 0)
        found = scan(step, (hidden, cell), gates)
        hiddens, contexts, weights = (
            ops.moveaxis(each, 0, 2) for each in found
        )  # (images, captions, steps, units or regions)
        logits = self.deep_output(
            embedded, hiddens, contexts, training=training
        )
        return logits, weights

    def start(self, features: Any, training: bool = False) -> Any:
        """What decoding starts from.

        Args:
            features: (images, regions, channels).
            training: whether to drop out.

        Returns:
            Annotations (images, regions, units), keys (images, regions,
            attention units), h and c (images, units).
        """
        annotations = self.annotation(self.standardisation(features))
        annotations = self.annotation_dropout(annotations, training=training)
        keys = self.attention.key(annotations)
        return annotations, keys, *self.initial_state(annotations)

    def step(
        self, word: Any, hidden: Any, cell: Any, keys: Any, annotations: Any
    ) -> Any:
        """One step of a search.

        Args:
            word: the last word of each hypothesis, int32 (hypotheses,); each
                image has as many, and they stand together.
            hidden: h (hypotheses, units).
            cell: c (hypotheses, units).
            keys: from `start`, (images, regions, attention units).
            annotations: from `start`, (images, regions, units).

        Returns:
            Log-probabilities of the next word, float32 (hypotheses,
            vocabulary), h, c, and attention weights (hypotheses, regions).
        """
        embedded = self.embedding(word)
        images, regions, _ = ops.shape(keys)
        units = hidden.shape[-1]
        # The regions of an image are there once for all of its hypotheses.
        context, alpha = self.attention(
            ops.reshape(hidden, (images, -1, units)),
            ops.expand_dims(keys, 1),
            ops.expand_dims(annotations, 1),
        )
        context = self.gate(hidden, ops.reshape(context, (-1, units)))
        alpha = ops.reshape(alpha, (-1, regions))
        gates = self.cell.word_gates(embedded)
        hidden, cell = self.cell(gates, hidden, cell, context)
        logits = self.deep_output(embedded, hidden, context)
        log_probabilities = ops.log_softmax(ops.cast(logits, "float32"))
        return log_probabilities, hidden, cell, alpha

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        return {**super().get_config(), **self.settings}


class Ensemble(TeacherForced):
    """Several decoders whose probabilities are averaged, teacher-forced.

    Args:
        decoders: of one vocabulary; their features may differ.
    """

    def __init__(self, decoders: Sequence[CaptioningModel]) -> None:
        super().__init__()
        self.decoders = list(decoders)

    def build(self, shapes: Any) -> None:
        """Nothing to make: the decoders have their weights."""
        self.built = True

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        """Scores every next word, given the true words before it.

        Args:
            inputs: as `CaptioningModel` takes them, with a tuple of features.
            training: has no effect.

        Returns:
            Logarithm of the mean probability, float32 (tokens, vocabulary).
        """
        found = []
        for decoder, each in zip(
            self.decoders, inputs["features"], strict=True
        ):
            logits = decoder({**inputs, "features": each})
            found.append(ops.log_softmax(ops.cast(logits, "float32")))
        return search.average(found)


def doubly_stochastic_penalty(
    attention: Any, words: Any, caption: Any = None
) -> Any:
    """Asks that each region gets about as much attention as the others.

    mean_i (1 - sum_t alpha_ti)^2 (Xu et al. 2015, equation 14, averaged over
    regions so that its size does not depend on the encoder).

    Args:
        attention: alpha, float32 (tokens, regions), or of padded captions
            (images, captions, steps, regions).
        words: int32 (tokens,) or (images, captions, steps); padding counts
            for nothing.
        caption: which caption a token belongs to, int32 (tokens,); None if
            the captions are padded.

    Returns:
        The sum over the captions.
    """
    if caption is None:
        real = ops.cast(ops.expand_dims(words != PAD, -1), "float32")
        received = ops.sum(attention * real, axis=2)
        there = ops.max(real, axis=2)  # (images, captions, 1)
    else:
        captions = ops.max(caption) + 1
        received = ops.segment_sum(attention, caption, captions)
        there = ops.ones_like(received[:, :1])
    penalty = ops.mean(ops.square(1 - received), -1, keepdims=True)
    return ops.sum(penalty * there)


def build_model(
    config: Config, vocabulary_size: int, channels: int
) -> CaptioningModel:
    """Builds the decoder that a config describes, with its weights drawn.

    Args:
        config: its model and training fields.
        vocabulary_size: how many words there are.
        channels: of the encoder's features.
    """
    model = CaptioningModel(
        vocabulary_size,
        config.max_caption_length + 1,
        config.decoder_units,
        config.attention_units,
        config.embedding_units,
        config.word_dropout,
        config.output_dropout,
        config.attention_regularisation,
    )
    model.build({"features": (None, None, channels)})
    return model


def load_decoder(
    config: Config, run: Path
) -> tuple[CaptioningModel, vocabulary.Vocabulary]:
    """Builds the decoder of a trained run, with its best weights.

    Args:
        config: from `runs.decoding_config`.
        run: the run folder.

    Returns:
        The decoder and its vocabulary.
    """
    words = vocabulary.load(run / "vocabulary.json")
    _, (_, channels) = runs.load_features(run)
    decoder = build_model(config, len(words), channels)
    runs.load_weights(decoder, run)
    return decoder, words


# --- training --------------------------------------------------------------


class AdamW(keras.optimizers.AdamW):
    """AdamW that clips the gradient of the whole batch.

    On TensorFlow Keras clips each device's part and sums them then. There it
    also goes over the weights two dozen times, where three operations will do.

    Args:
        embedding_rate: times the learning rate, for word embeddings; their
            weight decay is that of the other weights.
    """

    def __init__(
        self, *args: Any, embedding_rate: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.embedding_rate = embedding_rate

    def _clip_gradients(self, gradients: list[Any]) -> list[Any]:
        gradients = over_devices(gradients)
        if TENSORFLOW and self.global_clipnorm:
            return clip_by_global_norm(gradients, self.global_clipnorm)
        return super()._clip_gradients(gradients)

    def _all_reduce_sum_gradients(self, pairs: list[Any]) -> list[Any]:
        return pairs

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        if not TENSORFLOW:
            super()._apply_weight_decay(variables)

    def _update_model_variables_moving_average(
        self, variables: list[Any]
    ) -> None:
        if not TENSORFLOW:
            super()._update_model_variables_moving_average(variables)

    def update_step(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        """The step of Loshchilov and Hutter 2019, algorithm 2."""
        place, decay_rate = self._get_variable_index(variable), learning_rate
        if "embedding/" in self._trainable_variables[place].path:
            learning_rate = learning_rate * self.embedding_rate
        if not TENSORFLOW:
            super().update_step(gradient, variable, learning_rate)
            return
        moments = (self._momentums[place], self._velocities[place])
        average = None
        if self.use_ema:
            average = self._model_variables_moving_average[place]
        rates = (learning_rate, decay_rate)
        adamw_step(self, variable, moments, average, gradient, rates)


@keras.saving.register_keras_serializable("captioning")
class SmoothedCrossEntropy(keras.losses.Loss):
    """Cross-entropy with label smoothing, summed over the words.

    Label smoothing is that of Szegedy et al. 2016, section 7. The sample
    weights are 1 for a word and 0 for padding: padding changes nothing.

    Args:
        smoothing: share of the target that is spread over all words.
    """

    def __init__(self, smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**{"reduction": "sum", **kwargs})
        self.smoothing = smoothing

    def call(self, targets: Any, logits: Any) -> Any:
        """Targets (..., steps) and logits (..., vocabulary) -> (..., steps)."""
        rows = ops.reshape(logits, (-1, logits.shape[-1]))
        flat = ops.reshape(ops.cast(targets, "int32"), (-1,))
        found = gradients.cross_entropy(rows, flat, self.smoothing)
        return ops.reshape(found, ops.shape(targets))

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        return {**super().get_config(), "smoothing": self.smoothing}


@keras.saving.register_keras_serializable("captioning")
class TokenAccuracy(keras.metrics.Mean):
    """Share of reference words that are among the model's first `best`.

    A word outside the vocabulary counts and is never right.
    """

    def __init__(
        self, best: int = 1, name: str = "token_accuracy", **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.best = best

    def update_state(
        self, targets: Any, logits: Any, sample_weight: Any = None
    ) -> None:
        """Adds a batch; the sample weights are 0 where there is padding."""
        targets = ops.cast(targets, "int32")
        if self.best == 1:
            hit = largest(logits) == targets
        else:
            shape = (-1, logits.shape[-1])
            hit = ops.in_top_k(
                ops.reshape(targets, (-1,)),
                ops.cast(ops.reshape(logits, shape), "float32"),
                self.best,
            )
            hit = ops.reshape(hit, ops.shape(targets))
        hit = ops.logical_and(hit, targets != UNKNOWN)
        super().update_state(ops.cast(hit, "float32"), sample_weight)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        return {**super().get_config(), "best": self.best}
