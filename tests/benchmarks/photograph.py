"""What one photograph costs, beside the encoder and the search alone.

    python tests/benchmarks/photograph.py [flags of caption.py] photo.jpg

Captions a photograph as caption.py and --serve do, once everything is built,
and runs the encoder and a search on a batch of one image, in turns. Prints the
seconds of both, the lowest of several rounds, and their ratio.
"""

import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import caption  # noqa: E402
from captioning import command  # noqa: E402

ROUNDS = 7


def main(arguments: command.Arguments) -> None:
    """Measures a photograph."""
    config, run = caption.open_run(arguments)
    captioner = caption.load_captioner(config, run, one_by_one=True)

    import numpy as np

    from captioning.decoding import captioner as decoding
    from captioning.features import extraction

    (photo,) = arguments.actions.photos
    encoder, search, _ = decoding.load(config, run)
    pixels = extraction.read(Path(), photo, config.input_size).pixels
    assert pixels is not None, f"{photo} cannot be read"

    def whole() -> Any:
        read = extraction.read(Path(), photo, config.input_size)
        return captioner([read.pixels])

    def alone() -> Any:
        features = encoder.predict_on_batch(pixels[None])
        return search.predict_on_batch([np.asarray(features)])

    seconds: dict[Any, float] = {}
    for each in [whole, alone] * (1 + ROUNDS):  # the first round compiles
        begun = time.perf_counter()
        each()
        took = time.perf_counter() - begun
        # The first round is there to compile.
        seconds[each] = min(took, seconds[each]) if each in seconds else 1e9
    print(
        f"A photograph {seconds[whole]:.3f} s, encoder and search alone "
        f"{seconds[alone]:.3f} s: {seconds[whole] / seconds[alone]:.2f} times"
    )


if __name__ == "__main__":
    command.run(main, __doc__, caption.ACTIONS)
