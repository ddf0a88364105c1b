"""Which caption of a beam agrees most with the whole beam.

The most likely caption does not have the best expected score; the one most
similar to the other likely captions does (minimum Bayes risk, Kumar and Byrne
2004, equation 2). Similarity is CIDEr-D's with equal weights for all n-grams,
because a run folder has no document frequencies.
"""

from typing import Any

from keras import ops

from captioning.data.vocabulary import PAD

# CIDEr-D's longest n-gram, and the width of its penalty on other lengths.
ORDERS = 4
SIGMA = 6.0


def agreement(words: Any, log_probabilities: Any, temperature: float) -> Any:
    """The expected similarity of each caption to those of its beam.

    Args:
        words: int32 (images, hypotheses, steps), padded; `<end>` is a word.
        log_probabilities: of the hypotheses, float32 (images, hypotheses).
        temperature: above 0; at 1 the hypotheses count by their
            probabilities, above it the less likely ones count for more.

    Returns:
        Float32 (images, hypotheses), from 0 to 1.
    """
    weights = ops.softmax(log_probabilities / temperature)
    # One image at a time: the comparison takes hypotheses^2 * steps^2.
    similar = ops.map(similarity, words)  # (images, hypotheses, hypotheses)
    return ops.sum(similar * ops.expand_dims(weights, 1), axis=2)


def similarity(words: Any) -> Any:
    """The similarity of each pair of captions, by their n-grams.

    CIDEr-D (Vedantam et al. 2015, section 4 and the end of section 6) without
    document frequencies: the mean over orders of the cosine of n-gram counts,
    clipped to those of the other caption, times a penalty on other lengths.

    Args:
        words: int32 (hypotheses, steps), padded; `<end>` is a word.

    Returns:
        Float32 (hypotheses, hypotheses): of the first as a caption to the
        second as its reference.
    """
    real = words != PAD
    # Where the words of two captions are the same: (hypotheses, hypotheses,
    # steps of the first, steps of the second).
    same = words[:, None, :, None] == words[None, :, None, :]
    same = ops.logical_and(same, real[:, None, :, None])
    ngrams, cosines = same, 0.0
    for order in range(ORDERS):
        if order:
            ngrams = ops.logical_and(
                ngrams[:, :, :-1, :-1], same[:, :, order:, order:]
            )
        # How often the first has each n-gram of the second.
        counts = ops.sum(ops.cast(ngrams, "float32"), axis=2)
        own = ops.transpose(ops.diagonal(counts))  # (hypotheses, steps)
        products = ops.sum(ops.minimum(counts, own), axis=2)
        norms = ops.sqrt(ops.sum(own, axis=1))
        norms = norms[:, None] * norms
        cosines = cosines + products / ops.maximum(norms, 1) / ORDERS
    lengths = ops.sum(ops.cast(real, "float32"), axis=1)
    difference = lengths[:, None] - lengths
    return cosines * ops.exp(-(difference**2) / (2 * SIGMA**2))
