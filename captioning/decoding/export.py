"""Encoder, decoder and search as one program that needs none of this code."""

import os
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from captioning.data.vocabulary import END, Vocabulary
from captioning.decoding.search import BeamSearch
from config import UserError


def save(
    encoder: keras.Model,
    search: BeamSearch,
    vocabulary: Vocabulary,
    size: int,
    folder: Path,
) -> None:
    """Writes a TensorFlow SavedModel.

    Its signature takes `images`, uint8 RGB (batch, size, size, 3), and returns
    for the best captions `word_ids`, int32 (batch, steps), `words`, strings
    (batch, steps), empty from `<end>` on, and `scores`, float32 (batch,), the
    normalised log-probabilities.

    Args:
        encoder: from `model.build_encoder`.
        search: from `captioner.build`, of one decoder.
        vocabulary: the words.
        size: side of the images in pixels.
        folder: where to; it must not be there yet.

    Raises:
        UserError: if the folder is there, or Keras runs on another backend.
    """
    if keras.backend.backend() != "tensorflow":
        raise UserError(
            "--export writes a TensorFlow SavedModel: run it with "
            "KERAS_BACKEND=tensorflow"
        )
    if folder.exists():
        raise UserError(f"{folder} already exists: choose another folder")
    # What ends a caption has no text.
    texts = ["" if n <= END else w for n, w in enumerate(vocabulary.words)]

    def caption(images: Any) -> dict[str, Any]:
        found = search(encoder(images, training=False))
        word_ids = found["words"][:, 0]  # (batch, steps)
        return {
            "word_ids": word_ids,
            "words": ops.take(np.array(texts), word_ids),
            "scores": found["scores"][:, 0],
        }

    archive = keras.export.ExportArchive()
    # Not the models: Keras would look for a signature of each one's own.
    weights = [*encoder.variables, *search.variables]
    archive.add_variable_collection("weights", weights)
    shape = (None, size, size, 3)
    images = keras.InputSpec(dtype="uint8", shape=shape, name="images")
    archive.add_endpoint("serve", caption, input_signature=[images])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        archive.write_out(os.path.join(part, "model"), verbose=False)
        os.replace(os.path.join(part, "model"), folder)
