"""Which caption of a beam agrees most with what the decoder would say.

The most likely caption does not have the best expected score; the one most
similar to the captions that the decoder gives to an image does (minimum Bayes
risk, Kumar and Byrne 2004, equation 2). What it gives is known from its beam,
and better from samples (Eikema and Aziz 2022), which do not leave out what is
unlikely in each case, but likely in sum. Similarity is CIDEr-D's. A run has no
document frequencies, but its vocabulary is sorted by frequency: by Zipf's law
the nth word is n times as rare as the first.
"""

from typing import Any

from keras import ops

from captioning.data.vocabulary import PAD, UNKNOWN

# CIDEr-D's longest n-gram, and the width of its penalty on other lengths.
ORDERS = 4
SIGMA = 6.0
# The weight of all samples; the captions of the beam have the rest.
SAMPLED = 0.9


def agreement(
    words: Any, log_probabilities: Any, temperature: float, samples: Any = None
) -> Any:
    """The expected similarity of each caption to what the decoder would say.

    Args:
        words: int32 (images, hypotheses, steps), padded; `<end>` is a word.
        log_probabilities: of the hypotheses, float32 (images, hypotheses).
        temperature: above 0; at 1 the hypotheses count by their
            probabilities, above it the less likely ones count for more.
        samples: of the decoder, int32 (images, samples, steps), padded; None
            leaves it to the hypotheses.

    Returns:
        Float32 (images, hypotheses), from 0 to 1.
    """
    weights = ops.softmax(log_probabilities / temperature)
    others = words
    if samples is not None:
        share = SAMPLED / samples.shape[1]
        even = ops.full_like(samples[:, :, 0], share, dtype="float32")
        weights = ops.concatenate([(1 - SAMPLED) * weights, even], axis=1)
        others = ops.concatenate([words, samples], axis=1)
    # One image at a time: the comparison takes hypotheses * others * steps^2.
    similar = ops.map(lambda both: similarity(*both), (words, others))
    return ops.sum(similar * ops.expand_dims(weights, 1), axis=2)


def similarity(words: Any, others: Any) -> Any:
    """The similarity of each caption to each of the others, by their n-grams.

    CIDEr-D (Vedantam et al. 2015, section 4 and the end of section 6): the mean
    over orders of the cosine of weighted n-gram counts, clipped to those of the
    other caption, times a penalty on other lengths. An n-gram weighs as much
    as its words together, and a word the logarithm of its rank in the
    vocabulary; `<end>` weighs nothing.

    Args:
        words: int32 (hypotheses, steps), padded; `<end>` is a word.
        others: int32 (others, steps), padded.

    Returns:
        Float32 (hypotheses, others): of the first as a caption to the second
        as its reference.
    """
    # Where the n-grams of two captions are the same: (..., steps of the first,
    # steps of the second).
    pairs = [
        _same(words[:, None], others[None]),
        _same(words, words),
        _same(others, others),
    ]
    single = [_rarity(words), _rarity(others)]
    ngrams, rarity, cosines = pairs, single, 0.0
    for order in range(ORDERS):
        if order:
            ngrams = [
                ops.logical_and(each[..., :-1, :-1], same[..., order:, order:])
                for each, same in zip(ngrams, pairs, strict=True)
            ]
            rarity = [
                each[:, :-1] + word[:, order:]
                for each, word in zip(rarity, single, strict=True)
            ]
        # How often the first has each n-gram of the second.
        counts, own, theirs = (
            ops.sum(ops.cast(each, "float32"), axis=-2) for each in ngrams
        )
        squares = [ops.square(each) for each in rarity]
        products = ops.sum(ops.minimum(counts, theirs) * squares[1], axis=2)
        norms = ops.sqrt(
            ops.sum(own * squares[0], axis=1)[:, None]
            * ops.sum(theirs * squares[1], axis=1)
        )
        cosines = cosines + products / ops.maximum(norms, 1e-6) / ORDERS
    lengths, theirs = (
        ops.sum(ops.cast(each != PAD, "float32"), axis=1)
        for each in (words, others)
    )
    difference = lengths[:, None] - theirs
    return cosines * ops.exp(-(difference**2) / (2 * SIGMA**2))


def _same(words: Any, others: Any) -> Any:
    """Where two captions (..., steps) have the same word: both steps last."""
    same = words[..., :, None] == others[..., None, :]
    return ops.logical_and(same, (words != PAD)[..., :, None])


def _rarity(words: Any) -> Any:
    """The logarithm of the rank of each word; 0 for special ones."""
    return ops.log(ops.cast(ops.maximum(words - UNKNOWN, 1), "float32"))
