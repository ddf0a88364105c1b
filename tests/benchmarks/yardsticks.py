"""Decoders as they are written in many repositories, to measure ours by.

Both are Show, Attend and Tell (Xu et al. 2015) over cached features. Every
caption brings the features of its image along, and the keys of the attention
are computed anew at every step. Each function gives another one, warmed up,
that trains on all captions once and says how many these were.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from captioning.data.vocabulary import PAD

REGIONS, CHANNELS, WORDS, UNITS = 49, 2048, 8000, 512
THREADS = os.cpu_count()

# Goes once over the captions; gives how many there were.
Epoch = Callable[[], int]


def caption_loader(folder: Path, owners: np.ndarray, rows: np.ndarray) -> Any:
    """Yardstick A's input: PyTorch's loader over our file, in one process."""
    import torch

    features = np.load(folder / "features.npy", mmap_mode="r")

    def load(places: list[int]) -> tuple[Any, Any]:
        images = [features[owners[place]] for place in places]
        annotations = np.stack(images).astype(np.float32)
        words = rows[places].astype(np.int64)
        return torch.from_numpy(annotations), torch.from_numpy(words)

    captions = range(len(rows))
    return torch.utils.data.DataLoader(
        captions, batch_size=32, shuffle=True, collate_fn=load
    )


def with_pytorch(folder: Path, owners: np.ndarray, rows: np.ndarray) -> Epoch:
    """Yardstick A: each caption brings its image; keys anew at each step.

    Args:
        folder: with features.npy and, for the other one, a file an image.
        owners: the image of each caption, int (captions,).
        rows: the captions, int32 (captions, steps + 1).
    """
    import torch
    from torch import nn
    from torch.nn.utils.rnn import pack_padded_sequence as pack

    torch.set_num_threads(THREADS)
    loader = caption_loader(folder, owners, rows)
    part = nn.ModuleDict(
        {
            "embedding": nn.Embedding(WORDS, UNITS),
            "hidden": nn.Linear(CHANNELS, UNITS),
            "cell": nn.Linear(CHANNELS, UNITS),
            "key": nn.Linear(CHANNELS, UNITS),
            "query": nn.Linear(UNITS, UNITS),
            "score": nn.Linear(UNITS, 1),
            "gate": nn.Linear(UNITS, CHANNELS),
            "lstm": nn.LSTMCell(UNITS + CHANNELS, UNITS),
            "dropout": nn.Dropout(0.5),
            "logits": nn.Linear(UNITS, WORDS),
        }
    )
    adam = torch.optim.Adam(part.parameters(), 4e-4)

    def step(annotations: Any, words: Any) -> None:
        lengths = (words[:, 1:] != PAD).sum(1)
        lengths, order = lengths.sort(descending=True)
        annotations, words = annotations[order], words[order]
        lengths = lengths.tolist()
        embedded = part["embedding"](words)  # (captions, steps + 1, units)
        mean = annotations.mean(1)
        hidden, cell = part["hidden"](mean), part["cell"](mean)
        logits = torch.zeros(len(words), lengths[0], WORDS)
        attention = torch.zeros(len(words), lengths[0], REGIONS)
        for time_step in range(lengths[0]):
            count = sum(length > time_step for length in lengths)
            hidden, cell = hidden[:count], cell[:count]
            shown = annotations[:count]
            energy = part["key"](shown) + part["query"](hidden).unsqueeze(1)
            # (captions that go on, regions), then (.., channels)
            alpha = part["score"](energy.relu()).squeeze(2).softmax(1)
            context = (shown * alpha.unsqueeze(2)).sum(1)
            context = part["gate"](hidden).sigmoid() * context
            entering = torch.cat([embedded[:count, time_step], context], 1)
            hidden, cell = part["lstm"](entering, (hidden, cell))
            logits[:count, time_step] = part["logits"](part["dropout"](hidden))
            attention[:count, time_step] = alpha
        scores = pack(logits, lengths, batch_first=True).data
        targets = pack(words[:, 1:], lengths, batch_first=True).data
        loss = nn.functional.cross_entropy(scores, targets)
        loss = loss + (1 - attention.sum(1)).square().mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(part.parameters(), 5.0)
        adam.step()

    def epoch() -> int:
        for annotations, words in loader:
            step(annotations, words)
        return len(rows)

    step(*next(iter(loader)))  # warms up
    return epoch


def caption_files(folder: Path, owners: np.ndarray, rows: np.ndarray) -> Any:
    """Yardstick B's input: a file an image, read by NumPy within tf.data."""
    import tensorflow as tf

    def load(path: Any, row: Any) -> Any:
        read = tf.numpy_function(
            lambda name: np.load(name.decode()), [path], tf.float32
        )
        return tf.ensure_shape(read, (REGIONS, CHANNELS)), row

    paths = [str(folder / f"{owner}.npy") for owner in owners]
    data = tf.data.Dataset.from_tensor_slices((paths, rows))
    data = data.shuffle(1000).map(load, tf.data.AUTOTUNE)
    return data.batch(64, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def with_tensorflow(
    folder: Path, owners: np.ndarray, rows: np.ndarray
) -> Epoch:
    """Yardstick B: all steps unrolled, with their padding; nothing hoisted.

    It takes what `with_pytorch` takes.
    """
    import keras
    import tensorflow as tf
    from keras.layers import Dense

    keras.config.set_dtype_policy("float32")  # ours keeps its own
    data = caption_files(folder, owners, rows)
    embedding = keras.layers.Embedding(WORDS, UNITS)
    first_hidden, first_cell = Dense(UNITS), Dense(UNITS)
    key, query, score = Dense(UNITS), Dense(UNITS), Dense(1)
    gate = Dense(CHANNELS, "sigmoid")
    lstm = keras.layers.LSTMCell(UNITS)
    dropout, logits = keras.layers.Dropout(0.5), Dense(WORDS)
    parts = [embedding, first_hidden, first_cell, key, query, score, gate]
    parts += [lstm, logits]
    adam = keras.optimizers.Adam(4e-4, clipvalue=5.0)

    def loss_of(annotations: Any, words: Any) -> Any:
        real = tf.cast(words[:, 1:] != PAD, tf.float32)
        mean = tf.reduce_mean(annotations, 1)
        hidden, cell = first_hidden(mean), first_cell(mean)
        received = tf.zeros(annotations.shape[:2])
        loss = 0.0
        for time_step in range(words.shape[1] - 1):
            energy = tf.tanh(key(annotations) + query(hidden)[:, None])
            alpha = tf.nn.softmax(score(energy), 1)  # (captions, regions, 1)
            context = tf.reduce_sum(alpha * annotations, 1)  # (.., channels)
            context = gate(hidden) * context
            word = embedding(words[:, time_step])
            entering = tf.concat([word, context], 1)
            _, (hidden, cell) = lstm(entering, [hidden, cell])
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                words[:, time_step + 1], logits(dropout(hidden, training=True))
            )
            loss += tf.reduce_sum(losses * real[:, time_step])
            received += alpha[..., 0] * real[:, time_step, None]
        penalty = tf.reduce_mean(tf.square(1 - received))
        return loss / tf.reduce_sum(real) + penalty

    loss_of(*next(iter(data)))  # makes the weights
    weights = [each for part in parts for each in part.trainable_variables]
    adam.build(weights)

    @tf.function
    def step(annotations: Any, words: Any) -> None:
        with tf.GradientTape() as tape:
            loss = loss_of(annotations, words)
        adam.apply(tape.gradient(loss, weights))

    def epoch() -> int:
        captions = 0
        for annotations, words in data:
            step(annotations, words)
            captions += len(words)
        return captions

    step(*next(iter(data)))  # compiles it
    return epoch
