"""What training minimises, and the optimizer that does."""

import math
from typing import Any

import keras
from keras import ops

from captioning.backend import TENSORFLOW
from captioning.data.vocabulary import UNKNOWN
from config import Config


class SmoothedCrossEntropy(keras.losses.Loss):
    """Cross-entropy with label smoothing, averaged over the words of a batch.

    Label smoothing is that of Szegedy et al. 2016, section 7. Sample weights
    are 1 for a word and 0 for padding: padding changes nothing.

    Args:
        smoothing: share of the target that is spread over all words.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__(reduction="mean_with_sample_weight")
        self.smoothing = smoothing

    def call(self, targets: Any, logits: Any) -> Any:
        """Targets (tokens,) and logits (tokens, vocabulary) -> (tokens,)."""
        return keras.losses.categorical_crossentropy(
            ops.one_hot(targets, logits.shape[-1]),
            ops.cast(logits, "float32"),
            from_logits=True,
            label_smoothing=self.smoothing,
        )


class TokenAccuracy(keras.metrics.Mean):
    """The share of reference words that the model ranks first.

    A word outside the vocabulary counts and is never right. Of words that tie,
    as they do now and then in bfloat16, each is ranked first.
    """

    def update_state(
        self, targets: Any, logits: Any, sample_weight: Any = None
    ) -> None:
        """Adds a batch; sample weights are 0 where there is padding."""
        targets = ops.cast(targets, "int32")
        first = ops.in_top_k(targets, ops.cast(logits, "float32"), 1)
        hit = ops.logical_and(first, targets != UNKNOWN)
        super().update_state(ops.cast(hit, "float32"), sample_weight)


class AdamW(keras.optimizers.AdamW):
    """Keras's AdamW, the same on every backend, for any number of fits."""

    def apply(self, grads: list[Any], trainable_variables: Any = None) -> None:
        """Updates the variables by their gradients.

        On TensorFlow, the gradient of an embedding comes as rows, one for each
        time that a word occurs. Adam would add up their squares.
        """
        if TENSORFLOW:
            import tensorflow as tf

            grads = [tf.convert_to_tensor(each) for each in grads]
        super().apply(grads, trainable_variables)

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Gives the variables their averages, at the end of `Model.fit`.

        On JAX, Keras leaves both in one buffer, which the next `fit` would
        donate twice.
        """
        super().finalize_variable_values(var_list)
        for variable in var_list:
            variable.assign(ops.copy(variable))


def build_optimizer(config: Config, rate: Any, steps: int) -> AdamW:
    """AdamW with clipped gradients and averaged weights.

    Args:
        config: its training fields.
        rate: the learning rate, a number or a schedule.
        steps: per epoch.
    """
    averaged = config.ema_epochs > 0
    momentum = math.exp(-1 / (config.ema_epochs * steps)) if averaged else 0.99
    return AdamW(
        rate,
        weight_decay=config.weight_decay,
        global_clipnorm=config.clip_norm or None,
        use_ema=averaged,
        ema_momentum=momentum,
    )
