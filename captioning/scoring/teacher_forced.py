"""Token accuracy and perplexity: next words, given the true words so far."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from captioning.data.vocabulary import UNKNOWN
from captioning.scoring.metrics import interval, ratio


def count(
    scored: Iterable[tuple[Any, Any, Any, Any]], images: Sequence[str]
) -> pd.DataFrame:
    """Counts what a model gets right.

    A token outside the vocabulary counts, and is never right.

    Args:
        scored: the inputs, targets and weights of each batch of
            `CaptionBatches`, all images in order, and the logits (tokens,
            vocabulary) that a model gives it.
        images: their names; the last batch may be padded with more.

    Returns:
        Sums over the reference tokens of each image, float64; captions.csv has
        them as columns, from which runs are compared.
    """
    found = []
    for inputs, targets, weights, logits in scored:
        rank, loss = _judge(logits, targets)  # (tokens,)
        known = targets != UNKNOWN
        real = weights > 0
        owner = np.concatenate(
            [
                np.repeat(inputs["image"][: len(each)], each.shape[1])
                for each in inputs["words"]
            ]
        )  # the image of each token, (tokens,)
        judged = {
            "tokens": real,  # padding not counted, `<end>` counted
            "right": known & (rank == 0),
            "right_top5": known & (rank < 5),  # among the model's first five
            "loss": loss,  # negative log-likelihoods, in nats
        }
        number = len(inputs["features"])
        sums = {
            name: np.bincount(owner, each * real, number)
            for name, each in judged.items()
        }
        found.append(pd.DataFrame(sums))
    return pd.concat(found)[: len(images)].set_axis(images)


def _judge(rows: np.ndarray, tokens: np.ndarray) -> tuple[Any, Any]:
    """The rank of each token, from 0, and its negative log-likelihood.

    Among equal logits the word that comes first in the vocabulary ranks first.

    Args:
        rows: logits, float32 (tokens, vocabulary).
        tokens: int (tokens,).

    Returns:
        int (tokens,) and float32 (tokens,).
    """
    own = np.take_along_axis(rows, tokens[:, None], axis=1)  # (tokens, 1)
    before = np.arange(rows.shape[1]) < tokens[:, None]
    rank = ((rows > own) | ((rows == own) & before)).sum(axis=1)
    highest = rows.max(axis=1, keepdims=True)
    total = np.exp(rows - highest).sum(axis=1)
    return rank, np.log(total) - (own - highest)[:, 0]


def figures(counts: pd.DataFrame) -> dict[str, Any]:
    """The teacher-forced metrics, as metrics.json has them.

    Args:
        counts: from `count`.

    Returns:
        The metrics, and under `intervals` the 95% interval of the token
        accuracy over resampled images.
    """
    tokens = counts.tokens.sum()
    right = counts[["right", "tokens"]].to_numpy()  # (images, 2)
    return {
        "token_accuracy": float(counts.right.sum() / tokens),
        "token_accuracy_top5": float(counts.right_top5.sum() / tokens),
        "perplexity": float(np.exp(counts.loss.sum() / tokens)),
        "intervals": {"token_accuracy": interval(right, ratio)},
    }
