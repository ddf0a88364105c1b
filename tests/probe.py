"""What a run says of its training split, as arrays; on any backend.

python -m tests.probe FOLDER RUN FILE
"""

import os
import sys
from pathlib import Path

import numpy as np

from captioning import command


def probe(folder: Path, run: str) -> dict[str, np.ndarray]:
    """Opens a run in a folder as `evaluate.py` does.

    Returns:
        `words`, the targets, int32 (tokens,); `log_probabilities` of them,
        float32 (tokens,), 0 at padding; `captions`, strings (images,);
        `scores` of them, float32 (images,).
    """
    import keras
    from keras import ops

    from captioning import backend
    from captioning.data import prepared
    from captioning.data.vocabulary import encode
    from captioning.decoding import captioner
    from captioning.runs import load_config
    from captioning.scoring.evaluation import open_run
    from captioning.training.batches import CaptionBatches

    place = folder / "checkpoints" / run
    config = load_config(place)
    backend.set_precision(config)
    split = prepared.load_split(config, "train")
    decoder, words, features = open_run(config, place, split.images)
    longest = config.max_caption_length
    captions = [encode(tokens, words, longest) for tokens in split.tokens]
    # Of one size on every backend.
    batches = CaptionBatches(features, captions, len(captions), static=True)
    inputs, targets, weights = batches[0]
    likely = ops.log_softmax(decoder(inputs))  # (tokens, vocabulary)
    chosen = ops.take_along_axis(likely, targets[:, None], 1)[:, 0]
    images = np.arange(len(features))
    found = captioner.caption_images(
        captioner.build(decoder, config), [features], images, words
    )
    return {
        "words": targets,
        "log_probabilities": ops.convert_to_numpy(chosen) * weights,
        "captions": np.array([each.caption for each in found]),
        "scores": np.array([each.n_best[0].score for each in found]),
        "backend": np.array(keras.backend.backend()),
    }


if __name__ == "__main__":
    command.import_keras()
    folder, run, file = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.chdir(folder)
    np.savez(file, **probe(folder, run))
