"""Which caption of a beam is most like what the decoder says of an image.

The likeliest caption does not have the best expected score; the one most
similar to the decoder's other captions does (minimum Bayes risk, Kumar and
Byrne 2004, equation 2). The beam stands for these, and samples do so better
(Eikema and Aziz 2022): they include captions that are unlikely one by one but
likely taken together. Similarity is CIDEr-D's. A run has no document
frequencies, but its vocabulary is sorted by frequency: by Zipf's law, the nth
word is n times as rare as the first.
"""

from collections.abc import Iterator
from typing import Any

from keras import ops

from captioning.data.vocabulary import PAD, UNKNOWN

# CIDEr-D's longest n-gram, and the width of its penalty on other lengths.
ORDERS = 4
SIGMA = 6.0
# The total weight of the samples; the beam has the rest. On Flickr8k's
# validation split, 0.9 and 1 have the same CIDEr (2026-11-30).
SAMPLE_WEIGHT = 0.9


def agreement(
    words: Any, log_probabilities: Any, temperature: float, samples: Any = None
) -> Any:
    """The expected similarity of each caption to what the decoder would say.

    Args:
        words: int32 (images, hypotheses, steps), padded; `<end>` is a word.
        log_probabilities: of the hypotheses, float32 (images, hypotheses).
        temperature: above 0; at 1 the hypotheses count by their
            probabilities, above it the less likely ones count for more.
        samples: captions sampled from the decoder, int32 (images, samples,
            steps), padded; None compares the hypotheses with each other alone.

    Returns:
        Float32 (images, hypotheses), from 0 to 1.
    """
    weights = ops.softmax(log_probabilities / temperature)
    others = words
    if samples is not None:
        share = SAMPLE_WEIGHT / samples.shape[1]
        even = ops.full_like(samples[:, :, 0], share, dtype="float32")
        weights = ops.concatenate([(1 - SAMPLE_WEIGHT) * weights, even], axis=1)
        others = ops.concatenate([words, samples], axis=1)
    # One image at a time: the comparison takes hypotheses * others * steps^2.
    similar = ops.map(lambda both: similarity(*both), (words, others))
    return ops.sum(similar * ops.expand_dims(weights, 1), axis=2)


def similarity(words: Any, others: Any) -> Any:
    """The similarity of each caption to each of the others, by their n-grams.

    CIDEr-D (Vedantam et al. 2015, section 4 and the end of section 6): the mean
    over orders of the cosine of weighted n-gram counts, clipped to those of the
    other caption, times a penalty on other lengths. An n-gram's weight is the
    sum of its words', and a word's is the logarithm of its rank in the
    vocabulary; `<end>` weighs nothing.

    Args:
        words: int32 (hypotheses, steps), padded; `<end>` is a word.
        others: int32 (others, steps), padded.

    Returns:
        Float32 (hypotheses, others): of the first as a caption to the second
        as its reference.
    """
    orders = zip(
        _counts(words[:, None], others[None]),
        _counts(words, words),
        _counts(others, others),
        _squared_weights(words),
        _squared_weights(others),
        strict=True,
    )
    cosines = 0.0
    for counts, own, theirs, squares, their_squares in orders:
        products = ops.minimum(counts, theirs) * their_squares
        norms = ops.sqrt(
            ops.sum(own * squares, axis=1)[:, None]
            * ops.sum(theirs * their_squares, axis=1)
        )  # (hypotheses, others)
        cosine = ops.sum(products, axis=2) / ops.maximum(norms, 1e-6)
        cosines = cosines + cosine / ORDERS
    difference = _lengths(words)[:, None] - _lengths(others)
    return cosines * ops.exp(-(difference**2) / (2 * SIGMA**2))


def _counts(words: Any, others: Any) -> Iterator[Any]:
    """For each order, how often a caption has each n-gram of another.

    Args:
        words: int32 (..., steps).
        others: int32 (..., steps).

    Yields:
        Float32 (..., n-grams of the other).
    """
    # Where both have the same: (..., steps of the one, steps of the other).
    same = words[..., :, None] == others[..., None, :]
    same = ops.logical_and(same, (words != PAD)[..., :, None])
    ngrams = same
    for order in range(ORDERS):
        if order:
            ngrams = ops.logical_and(
                ngrams[..., :-1, :-1], same[..., order:, order:]
            )
        yield ops.sum(ops.cast(ngrams, "float32"), axis=-2)


def _squared_weights(words: Any) -> Iterator[Any]:
    """For each order, the squared weights of n-grams, (captions, n-grams)."""
    rank = ops.maximum(words - UNKNOWN, 1)  # 1 for special words, too
    weights = total = ops.log(ops.cast(rank, "float32"))
    for order in range(ORDERS):
        if order:
            total = total[:, :-1] + weights[:, order:]
        yield ops.square(total)


def _lengths(words: Any) -> Any:
    """Words of each caption, `<end>` included."""
    return ops.sum(ops.cast(words != PAD, "float32"), axis=1)
