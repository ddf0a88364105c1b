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
        `words`, int32 (images, captions, steps); `log_probabilities` of the
        targets, float32 likewise, 0 at padding; `captions`, strings
        (images,); `scores` of them, float32 (images,).
    """
    import keras
    from keras import ops

    import evaluate
    from captioning import backend
    from captioning.data import prepared
    from captioning.data.vocabulary import encode
    from captioning.decoding import search
    from captioning.runs import load_config
    from captioning.training.batches import CaptionBatches

    place = folder / "checkpoints" / run
    config = load_config(place)
    backend.set_precision(config)
    split = prepared.load_split(config, "train")
    decoder, words, features, rows = evaluate.open_run(
        config, place, split.images
    )
    captions = [encode(t, words, decoder.steps - 1) for t in split.tokens]
    batches = CaptionBatches(features, rows, captions, len(rows), padded=True)
    inputs, targets, weights = batches[0]
    logits, _ = decoder.decode(inputs)
    chosen = ops.take_along_axis(
        ops.log_softmax(logits), targets[..., None], -1
    )[..., 0]
    found = search.caption_rows(
        search.build(decoder, config), features, rows, words
    )
    return {
        "words": inputs["words"],
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
