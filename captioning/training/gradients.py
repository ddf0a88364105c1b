"""Gradients worth writing by hand: those that cost most of a training step.

Left to itself, a backend goes back through the decoder's loop step by step. At
each it makes a gradient as large as every kernel and as all annotation vectors
of the batch, and adds all of these up. Here that is one product, over all words
or over the captions of an image. The values and the gradients are the same;
the tests hold them against those of plain layers.
"""

from typing import Any

from keras import ops

from captioning.backend import largest


class LoopKernel:
    """Weights that every step of a loop multiplies by.

    Args:
        kernel: (inputs, outputs), in the layers' arithmetic.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        # Laid out for the way back, which takes half as long then in float32.
        # In halves: TensorFlow would undo a transposition of the whole.
        halves = ops.split(kernel, [kernel.shape[1] // 2], axis=1)
        self.transposed = ops.concatenate(list(map(ops.transpose, halves)))
        self.rows = []  # what each step multiplied, (captions, inputs)

    def before(self, given: Any) -> Any:
        """Hands on what the products will be added to, before the loop.

        Its gradient is that of all the products, and with it comes, after the
        way back through the loop, the gradient of the kernel.

        Args:
            given: (tokens, width); the products are added to its last columns.
        """
        outputs = self.kernel.shape[1]

        @ops.custom_gradient
        def hand_on(given: Any, kernel: Any) -> Any:
            def gradients(upstream: Any) -> tuple[Any, Any]:
                rows = ops.transpose(ops.concatenate(self.rows))
                return upstream, ops.matmul(rows, upstream[:, -outputs:])

            return given + 0, gradients

        return hand_on(given, self.kernel)

    def __call__(self, rows: Any) -> Any:
        """(captions, inputs) -> (captions, outputs), one step's product."""
        self.rows.append(rows)

        @ops.custom_gradient
        def multiply(rows: Any) -> Any:
            def gradient(upstream: Any) -> Any:
                return ops.matmul(upstream, self.transposed)

            return ops.matmul(rows, self.kernel), gradient

        return multiply(rows)


def of_image(regions: Any, image: Any, owner: Any) -> Any:
    """What belongs to the image of each caption.

    Args:
        regions: (images, regions, units).
        image: of each caption, int32 (captions,).
        owner: the same, true at the image (captions, images).

    Returns:
        (captions, regions, units).
    """
    shape = ops.shape(regions)

    @ops.custom_gradient
    def take(regions: Any) -> Any:
        def gradient(upstream: Any) -> Any:
            rows = ops.reshape(upstream, (-1, shape[1] * shape[2]))
            owners = ops.transpose(ops.cast(owner, rows.dtype))
            return ops.reshape(ops.matmul(owners, rows), shape)

        return ops.take(regions, image, axis=0), gradient

    return take(regions)


def cross_entropy(logits: Any, targets: Any, smoothing: float) -> Any:
    """Cross-entropy with a share of the target spread over all words.

    Args:
        logits: (tokens, vocabulary).
        targets: int32 (tokens,).
        smoothing: the share (Szegedy et al. 2016, section 7).

    Returns:
        Float32 (tokens,).
    """
    dtype, spread = logits.dtype, smoothing / logits.shape[-1]
    column = ops.expand_dims(targets, -1)  # (tokens, 1)
    tokens = ops.expand_dims(ops.arange(ops.shape(targets)[0]), -1)
    places = ops.concatenate([ops.cast(tokens, "int32"), column], -1)

    @ops.custom_gradient
    def loss(logits: Any) -> Any:
        logits = ops.cast(logits, "float32")
        share = ops.softmax(logits)  # (tokens, vocabulary)
        likeliest = ops.expand_dims(largest(logits), -1)
        both = ops.concatenate([column, likeliest], -1)  # (tokens, 2)
        logits_of_both = ops.take_along_axis(logits, both, -1)
        share_of_both = ops.take_along_axis(share, both, -1)
        # The logarithm of the sum of exponentials, by the likeliest word,
        # whose share is never too small to have one.
        total = logits_of_both[:, 1] - ops.log(share_of_both[:, 1])
        wanted = (1 - smoothing) * logits_of_both[:, 0]
        wanted += smoothing * ops.mean(logits, -1)

        def gradient(upstream: Any) -> Any:
            chosen = share_of_both[:, 0] - spread - (1 - smoothing)
            found = (share - spread) * ops.expand_dims(upstream, -1)
            found = ops.scatter_update(found, places, chosen * upstream)
            return ops.cast(found, dtype)

        return total - wanted, gradient

    return loss(logits)
