"""The Keras model: frozen encoder, Bahdanau attention, LSTM decoder.

The architecture is that of Show, Attend and Tell (Xu et al. 2015) with soft
attention. What does not depend on the state of the decoder is computed outside
of the loop over words: attention keys once per image, however many captions it
has; the word's part of the LSTM and the output layer as one matrix product
each, over all words of all captions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from captioning.backend import scan, use_xla
from captioning.data.vocabulary import PAD
from captioning.features import encoder_weights, networks
from captioning.features.joined import averages
from config import ENCODERS, LAST, Config, UserError, each_encoder

# --- encoder ---------------------------------------------------------------


def build_encoder(config: Config) -> keras.Model:
    """Builds the frozen encoder; several of them are one with joined outputs.

    Args:
        config: its encoder fields name the networks, their weights and the
            size of the images.

    Returns:
        A model from uint8 RGB images (batch, size, size, 3), where size is
        `config.input_size`, to annotation vectors, float16 (batch, regions,
        channels).

    Raises:
        UserError: if weights cannot be loaded.
    """
    shape = (config.input_size, config.input_size, 3)
    images = keras.Input(shape, dtype="uint8", name="images")
    maps = [
        _annotate(images, name, weights, config.magnification)
        for name, weights in each_encoder(config)
    ]
    fewest = min(each.shape[1] for each in maps)
    for place, each in enumerate(maps):
        average = averages(each.shape[1], fewest)
        if average is not None:
            each = ops.matmul(average, ops.cast(each, "float32"))
            maps[place] = ops.cast(each, "float16")
    joined = ops.concatenate(maps, axis=2) if len(maps) > 1 else maps[0]
    encoder = keras.Model(images, joined)
    encoder.compile(jit_compile=use_xla())
    return encoder


def _annotate(images: Any, name: str, weights: str, magnification: int) -> Any:
    """The annotation vectors of one encoder.

    Args:
        images: uint8 RGB (batch, size, size, 3).
        name: of the encoder, a key of `ENCODERS`.
        weights: `imagenet`, `scenes`, `random` or the path of a weights file.
        magnification: how many times the images are enlarged.

    Returns:
        Float16 (batch, regions, channels).
    """
    network, truncated = _networks(name, images.shape[1], magnification)
    network.trainable = False
    encoder_weights.load(network, weights, name)

    module = getattr(keras.applications, ENCODERS[name].module)
    pixels = module.preprocess_input(ops.cast(images, "float32"))
    feature_map = truncated(pixels, training=False)  # (batch, h, w, channels)
    _, height, width, channels = feature_map.shape
    annotations = ops.reshape(feature_map, (-1, height * width, channels))
    annotations = ops.cast(annotations, "float32")
    if weights == "random":
        annotations = annotations / _size_of_response(truncated)
    # float16 ends at 65,504; a larger activation would become infinite.
    annotations = ops.clip(annotations, -65504, 65504)
    return ops.cast(annotations, "float16")


def feature_shape(config: Config) -> tuple[int, int]:
    """(regions, channels) of an encoder, from its networks without weights."""
    size, magnification = config.input_size, config.magnification
    shapes = [
        _networks(name, size, magnification)[1].output_shape
        for name, _ in each_encoder(config)
    ]
    regions = min(height * width for _, height, width, _ in shapes)
    return regions, sum(shape[-1] for shape in shapes)


def _networks(
    name: str, size: int, magnification: int
) -> tuple[keras.Model, keras.Model]:
    """An encoder's network without trained weights.

    Returns:
        The network, and the part of it that ends in the feature map (batch,
        height, width, channels). The map of an enlarged image is averaged in
        squares, so that it has no more regions than that of a plain one; if it
        does not divide evenly, the last squares are smaller.

    Raises:
        UserError: if the network does not take images as small as these.
    """
    try:
        network = networks.build(name, (size, size, 3))
    except ValueError as error:  # each network has a least size of its own
        raise UserError(f"{name} with --image-size: {error}") from None
    feature_map, layer = network.output, ENCODERS[name].layer
    if layer != LAST:
        feature_map = network.get_layer(layer).output
    if magnification > 1:
        pooling = keras.layers.AveragePooling2D(magnification, padding="same")
        feature_map = pooling(feature_map)
    return network, keras.Model(network.input, feature_map)


def _size_of_response(network: keras.Model) -> float:
    """The scale of a network's response to noise, with random filters.

    Without trained normalisation, activations grow or shrink from layer to
    layer, in deep networks beyond the range of float16. A power of two, so
    that rounding, which differs between backends, does not matter.
    """
    generator = np.random.default_rng(encoder_weights.RANDOM_SEED)
    noise = generator.normal(0, 100, (1, *network.input_shape[1:]))
    response = np.asarray(network(noise.astype("float32"), training=False))
    return 2.0 ** round(float(np.log2(np.std(response, dtype="float64"))))


# --- decoder ---------------------------------------------------------------


class FeatureStandardisation(keras.layers.Layer):
    """Shifts and scales features to mean 0 and variance 1 per channel.

    Encoders differ in scale by a factor of twenty. The statistics are those
    of the training split, set before training; as weights, they are saved
    with the run.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Creates the statistics for features (images, regions, channels)."""
        options = {"shape": shape[-1:], "trainable": False}
        self.mean = self.add_weight(name="mean", initializer="zeros", **options)
        self.deviation = self.add_weight(
            name="deviation", initializer="ones", **options
        )

    def call(self, features: Any) -> Any:
        """Standardises (images, regions, channels)."""
        features = ops.cast(features, "float32")
        standardised = (features - self.mean) / self.deviation
        return ops.cast(standardised, self.compute_dtype)


class StepWeights(NamedTuple):
    """The weights of one decoder step, in compute precision unless noted."""

    query: Any  # W_h of the attention (units, attention units)
    score: Any  # v of the attention, float32 (attention units, 1)
    gate: Any  # W_beta (units, units)
    gate_bias: Any  # float32 (units,)
    recurrent: Any  # of the LSTM, for the state (units, 4 * units)
    visual: Any  # of the LSTM, for the context (units, 4 * units)


class AttentionLSTM(keras.layers.Layer):
    """One step of the decoder: attend, gate the context, advance the LSTM.

    Bahdanau attention (Bahdanau et al. 2015, appendix A.1.2; Xu et al. 2015,
    equations 4-6 and 13), the gate beta (Xu et al., section 4.2.1, where beta
    is one number; here it has one per channel), and the LSTM (Xu et al.,
    equations 1-3).

    Args:
        units: size of the state, of the annotation vectors and of the context.
        attention_units: size of the attention's keys and queries.
    """

    def __init__(self, units: int, attention_units: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.units, self.attention_units = units, attention_units

    def build(self, shape: tuple[int | None, ...] | None = None) -> None:
        """Creates the weights."""
        units, attention = self.units, self.attention_units
        shapes = {
            "query": (units, attention),
            "score": (attention, 1),
            "gate": (units, units),
            "gate_bias": (units,),
            "recurrent": (units, 4 * units),
            "visual": (units, 4 * units),
        }
        initializers = {"gate_bias": "zeros", "recurrent": "orthogonal"}
        self.step_weights = [
            self.add_weight(
                name=name,
                shape=shapes[name],
                initializer=initializers.get(name, "glorot_uniform"),
            )
            for name in StepWeights._fields
        ]
        self.built = True

    def cast_weights(self) -> StepWeights:
        """The weights as `call` takes them: cast once, not at every step."""
        exact = {"score": "float32", "gate_bias": "float32"}
        return StepWeights(
            *(
                ops.cast(each, exact.get(each.name, self.compute_dtype))
                for each in self.step_weights
            )
        )

    def call(
        self,
        weights: StepWeights,
        word_gates: Any,
        hidden: Any,
        cell: Any,
        keys: Any,
        annotations: Any,
    ) -> tuple[Any, Any, Any, Any]:
        """Advances by one word.

        Sums, softmax and cell state are float32, products are in compute
        precision: a softmax over bfloat16 loses what tells regions apart.

        Args:
            weights: from `cast_weights`.
            word_gates: what the previous word adds to the gates of the LSTM
                (..., 4 * units).
            hidden: h (..., units).
            cell: c, float32 (..., units).
            keys: float32 (..., regions, attention units).
            annotations: annotation vectors a (..., regions, units).

        Returns:
            The next h (..., units) and c, float32 (..., units); the gated
            context z (..., units); the attention weights alpha, float32
            (..., regions). Leading dimensions are captions, or images and
            hypotheses, and broadcast.
        """
        query = _product(hidden, weights.query)  # (..., attention units)
        energy = ops.tanh(keys + ops.expand_dims(query, -2))
        scores = ops.matmul(energy, weights.score)  # (..., regions, 1)
        alpha = ops.softmax(ops.squeeze(scores, -1))  # (..., regions)
        row = ops.expand_dims(ops.cast(alpha, annotations.dtype), -2)
        context = ops.squeeze(ops.matmul(row, annotations), -2)  # (..., units)

        beta = _product(hidden, weights.gate) + weights.gate_bias
        beta = ops.cast(ops.sigmoid(beta), context.dtype)
        context = beta * context  # (..., units)

        gates = ops.cast(word_gates, "float32")  # (..., 4 * units)
        gates = gates + _product(hidden, weights.recurrent)
        gates = gates + _product(context, weights.visual)
        input_gate, forget_gate, candidate, output_gate = ops.split(
            gates, 4, axis=-1
        )
        cell = ops.sigmoid(forget_gate) * cell
        cell = cell + ops.sigmoid(input_gate) * ops.tanh(candidate)
        state = ops.sigmoid(output_gate) * ops.tanh(cell)
        return ops.cast(state, hidden.dtype), cell, context, alpha


def _product(rows: Any, kernel: Any) -> Any:
    """A matrix product in compute precision, as float32 for what adds to it."""
    return ops.cast(ops.matmul(rows, kernel), "float32")


class CaptioningModel(keras.Model):
    """The decoder over cached features: Show, Attend and Tell (Xu et al. 2015).

    Args:
        vocabulary_size: words, special ones included.
        decoder_units: size of the state and of the annotation vectors.
        attention_units: size of the attention's keys and queries.
        embedding_units: size of a word embedding.
        embedding_rate: multiple of the learning rate for the word embeddings.
            They are multiplied by it: under Adam, whose steps do not depend on
            the scale of a gradient, that is the same.
        word_dropout: dropout rate of embeddings and annotation vectors.
        output_dropout: dropout rate before the output layer.
        attention_regularisation: weight of the doubly stochastic penalty.
    """

    def __init__(
        self,
        vocabulary_size: int,
        decoder_units: int,
        attention_units: int,
        embedding_units: int,
        embedding_rate: float = 1.0,
        word_dropout: float = 0.0,
        output_dropout: float = 0.0,
        attention_regularisation: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        dense, dropout = keras.layers.Dense, keras.layers.Dropout
        self.vocabulary_size = vocabulary_size
        self.embedding_rate = embedding_rate
        self.attention_regularisation = attention_regularisation
        self.standardisation = FeatureStandardisation()
        self.annotation = dense(decoder_units, "relu", name="annotation")
        self.annotation_dropout = dropout(word_dropout)
        self.key = dense(attention_units, name="key")
        self.initial_hidden = dense(decoder_units, "tanh", name="hidden")
        self.initial_cell = dense(decoder_units, "tanh", name="cell")
        self.embedding = keras.layers.Embedding(
            vocabulary_size,
            embedding_units,
            keras.initializers.RandomUniform(
                -0.05 / embedding_rate, 0.05 / embedding_rate
            ),
            name="embedding",
        )
        self.word_dropout = dropout(word_dropout)
        self.word_gates = dense(
            4 * decoder_units,
            bias_initializer=_open_forget_gate,
            name="word_gates",
        )
        self.step = AttentionLSTM(decoder_units, attention_units, name="step")
        self.output_state = dense(embedding_units, name="output_state")
        self.output_context = dense(
            embedding_units, use_bias=False, name="output_context"
        )
        self.output_dropout = dropout(output_dropout)
        self.logits = dense(vocabulary_size, name="logits")

    def build(self, features: tuple[int | None, ...]) -> None:
        """Creates all weights, for features (images, regions, channels)."""
        state = (None, self.step.units)
        word = (None, self.embedding.output_dim)
        self.standardisation.build(features)
        self.annotation.build(features)
        for layer in (self.key, self.initial_hidden, self.initial_cell):
            layer.build(state)
        self.embedding.build((None,))
        self.word_gates.build(word)
        self.step.build()
        self.output_state.build(state)
        self.output_context.build(state)
        self.logits.build(word)
        self.built = True

    def call(self, inputs: dict[str, Any], training: bool = False) -> Any:
        """Scores every next word, given the true words before it.

        Args:
            inputs: a batch of `captioning.training.batches.CaptionBatches`.
            training: whether to apply dropout, and to add the penalty.

        Returns:
            Logits (tokens, vocabulary).
        """
        logits, attention = self.teacher_force(inputs, training)
        if training and self.attention_regularisation:
            penalty = doubly_stochastic_penalty(attention, inputs["words"])
            self.add_loss(self.attention_regularisation * penalty)
        return logits

    def teacher_force(
        self, inputs: dict[str, Any], training: bool = False
    ) -> tuple[Any, list[Any]]:
        """The forward pass; `call` without the penalty.

        Args:
            inputs: `features` (images, regions, channels); `image`, the image
                that each caption belongs to, int32 (captions,); and `words`,
                the words before those to predict, in terraces: int32 (captions,
                steps) for the first few steps, for the next few, and so on.
                Captions are sorted, the longest first: those of a terrace are
                the first ones of the terrace before.
            training: whether to apply dropout.

        Returns:
            Logits (tokens, vocabulary), terrace after terrace and in each
            caption after caption; and the attention weights of each terrace,
            float32 (captions, steps, regions).
        """
        annotations, keys, hidden, cell = self.start(
            inputs["features"], training
        )
        owner = ops.one_hot(inputs["image"], ops.shape(keys)[0])
        hidden = ops.take(hidden, inputs["image"], axis=0)  # (captions, units)
        cell = ops.take(cell, inputs["image"], axis=0)  # (captions, units)

        # What depends on the words alone is one product, outside of the loop.
        words = [ops.reshape(each, (-1,)) for each in inputs["words"]]
        embedded = self.embed(ops.concatenate(words))  # (tokens, embedding)
        embedded = self.word_dropout(embedded, training=training)
        word_gates = self.word_gates(embedded)  # (tokens, 4 * units)

        weights, first = self.step.cast_weights(), 0
        states, contexts, attention = [], [], []
        for terrace in inputs["words"]:
            captions, steps = ops.shape(terrace)[0], terrace.shape[1]
            hidden, cell = hidden[:captions], cell[:captions]
            here = owner[:captions]  # (captions, images)
            shown = of_image(keys, here), of_image(annotations, here)
            gates = word_gates[first : first + steps * captions]
            gates = ops.reshape(gates, (captions, steps, gates.shape[-1]))
            first = first + steps * captions

            def advance(state: Any, gates: Any, shown: Any = shown) -> Any:
                hidden, cell, context, alpha = self.step(
                    weights, gates, *state, *shown
                )
                return (hidden, cell), (hidden, context, alpha)

            (hidden, cell), found = scan(advance, (hidden, cell), gates)
            states.append(ops.reshape(found[0], (-1, hidden.shape[-1])))
            contexts.append(ops.reshape(found[1], (-1, hidden.shape[-1])))
            attention.append(found[2])  # (captions, steps, regions)
        logits = self.deep_output(
            embedded,
            ops.concatenate(states),  # (tokens, units)
            ops.concatenate(contexts),  # (tokens, units)
            training,
        )
        return logits, attention

    def start(self, features: Any, training: bool = False) -> Any:
        """What decoding starts from.

        h_0 and c_0 are made of the mean annotation vector (Xu et al. 2015,
        section 3.1.2). The keys W_a a do not depend on the state, so that an
        image has them once, however many captions it has.

        Args:
            features: (images, regions, channels).
            training: whether to apply dropout.

        Returns:
            Annotation vectors (images, regions, units); keys, float32 (images,
            regions, attention units); h (images, units); c, float32 (images,
            units).
        """
        annotations = self.annotation(self.standardisation(features))
        annotations = self.annotation_dropout(annotations, training=training)
        mean = ops.mean(annotations, axis=1)  # (images, units)
        return (
            annotations,
            ops.cast(self.key(annotations), "float32"),
            self.initial_hidden(mean),
            ops.cast(self.initial_cell(mean), "float32"),
        )

    def embed(self, words: Any) -> Any:
        """Words, int32 (...), as embeddings (..., embedding units)."""
        return self.embedding(words) * self.embedding_rate

    def deep_output(
        self, embedded: Any, hidden: Any, context: Any, training: bool = False
    ) -> Any:
        """L_o (E y + L_h h + L_z z) (Xu et al. 2015, equation 7).

        Args:
            embedded: the previous word (..., embedding units).
            hidden: h (..., units).
            context: z (..., units).
            training: whether to apply dropout, and to leave the logits in
                compute precision. Else they are float32: in bfloat16 the best
                two tie now and then.

        Returns:
            Logits (..., vocabulary).
        """
        parts = (
            embedded,
            self.output_state(hidden),
            self.output_context(context),
        )
        deep = sum(ops.cast(each, "float32") for each in parts)
        if training:
            return self.logits(self.output_dropout(deep, training=True))
        # Within a model Keras gives weights in compute precision.
        kernel = ops.cast(self.logits.kernel, "float32")
        return ops.matmul(deep, kernel) + ops.cast(self.logits.bias, "float32")

    def next_word(
        self,
        word: Any,
        hidden: Any,
        cell: Any,
        weights: StepWeights,
        keys: Any,
        annotations: Any,
    ) -> tuple[Any, Any, Any, Any]:
        """One step of a search.

        Args:
            word: the last word of each hypothesis, int32 (images, hypotheses).
            hidden: h (images, hypotheses, units).
            cell: c, float32 (images, hypotheses, units).
            weights: from `step.cast_weights`.
            keys: from `start`, (images, regions, attention units).
            annotations: from `start`, (images, regions, units).

        Returns:
            Log-probabilities of the next word, float32 (images, hypotheses,
            vocabulary); h, c (images, hypotheses, units); attention weights
            (images, hypotheses, regions).
        """
        embedded = self.embed(word)  # (images, hypotheses, embedding units)
        hidden, cell, context, alpha = self.step(
            weights,
            self.word_gates(embedded),
            hidden,
            cell,
            # The hypotheses of an image share its regions.
            ops.expand_dims(keys, 1),
            ops.expand_dims(annotations, 1),
        )
        logits = self.deep_output(embedded, hidden, context)
        return ops.log_softmax(logits), hidden, cell, alpha


def of_image(regions: Any, owner: Any) -> Any:
    """Gives each caption the regions of its image.

    A product instead of `ops.take`, whose gradient a GPU adds up in any order,
    so that a resumed run would differ in the last bit.

    Args:
        regions: (images, regions, units).
        owner: float32 (captions, images), 1 at the image of each caption.

    Returns:
        (captions, regions, units).
    """
    flat = ops.reshape(regions, (-1, regions.shape[1] * regions.shape[2]))
    found = ops.matmul(ops.cast(owner, regions.dtype), flat)
    return ops.reshape(found, (-1, *regions.shape[1:]))


def doubly_stochastic_penalty(
    attention: list[Any], words: Sequence[Any]
) -> Any:
    """Asks each caption to give every region about the same attention.

    mean_i (1 - sum_t alpha_ti)^2 (Xu et al. 2015, equation 14, averaged over
    regions so that its size does not depend on the encoder).

    Args:
        attention: alpha of each terrace, float32 (captions, steps, regions).
        words: of each terrace, int32 (captions, steps). Padding has no part.

    Returns:
        The mean over captions.
    """
    # What regions receive in a terrace and those after it; nothing at the end.
    received = attention[-1][:0, 0]  # (captions, regions)
    for alpha, word in reversed([*zip(attention, words, strict=True)]):
        real = ops.cast(ops.expand_dims(word != PAD, -1), "float32")
        here = ops.sum(alpha * real, axis=1)  # (captions, regions)
        longer = ops.shape(received)[0]
        received = ops.concatenate([here[:longer] + received, here[longer:]])
    # A batch may be padded with empty captions.
    there = ops.cast(words[0][:, 0] != PAD, "float32")  # (captions,)
    penalty = ops.mean(ops.square(1 - received), axis=-1)  # (captions,)
    return ops.sum(penalty * there) / ops.maximum(ops.sum(there), 1.0)


def _open_forget_gate(shape: tuple[int, ...], dtype: Any = None) -> Any:
    """A bias of 1 for the forget gate lets gradients through from the start.

    Source: Jozefowicz et al. 2015, section 2.2.
    """
    bias = np.zeros(shape, "float32")
    bias[shape[0] // 4 : shape[0] // 2] = 1
    return ops.convert_to_tensor(bias, dtype)


def build_model(
    config: Config, vocabulary_size: int, channels: int
) -> CaptioningModel:
    """Builds the decoder that a config describes, with random weights.

    Args:
        config: its model and training fields.
        vocabulary_size: words, special ones included.
        channels: of the encoder's features.
    """
    model = CaptioningModel(
        vocabulary_size,
        config.decoder_units,
        config.attention_units,
        config.embedding_units,
        config.embedding_rate,
        config.word_dropout,
        config.output_dropout,
        config.attention_regularisation,
    )
    model.build((None, None, channels))
    return model
