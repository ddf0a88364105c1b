"""How fast the beam search is, beside one that takes an image at a time.

    python tests/benchmarks/search.py [--precision float32]

Random weights and features: 49x2048 features, 512 units, 8,000 words, 20
words a caption, a beam of 5. Both searches do the same steps with the same
weights; that they find the same captions is asserted. Prints images a second
and the ratio, what the loop would give unrolled, and the rate of the search
that config.py and the flags describe.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from captioning import command  # noqa: E402
from config import Config, resolve  # noqa: E402

IMAGES, REGIONS, CHANNELS = 50, 49, 2048
UNITS, WORDS, LENGTH, BEAM = 512, 8000, 20, 5
ROUNDS = 5  # the fastest counts: others share the processor


def plain(decoder: Any, features: Any) -> list[int]:
    """A beam search as it is usually written: one image, step by step.

    Finished hypotheses leave the beam and make it smaller.
    """
    import numpy as np

    from captioning.data.vocabulary import END, PAD, START, UNKNOWN

    annotations, keys, *state = decoder.start(features[None])
    hidden, cell = (each[:, None] for each in state)
    beam = [(0.0, [START])]
    finished = []
    for step in range(LENGTH + 1):
        width = len(beam)
        last = np.array([words[-1] for _, words in beam])
        found, hidden, cell, _ = decoder.next_word(
            last[:, None],
            hidden,
            cell,
            decoder.step.cast_weights(),
            np.repeat(keys, width, axis=0),
            np.repeat(annotations, width, axis=0),
        )
        found = np.array(found)[:, 0]  # (hypotheses, vocabulary)
        found[:, [PAD, START, UNKNOWN]] = -np.inf
        if step == 0:
            found[:, END] = -np.inf
        total = np.array([score for score, _ in beam])[:, None] + found
        order = np.argsort(-total, axis=None)[: BEAM - len(finished)]
        kept, parents = [], []
        for place in order:
            parent, word = divmod(int(place), WORDS)
            words = [*beam[parent][1], word]
            if word == END:
                finished.append((float(total.flat[place]), words))
            else:
                kept.append((float(total.flat[place]), words))
                parents.append(parent)
        # After the longest caption only `<end>` is of interest.
        if not kept or step == LENGTH:
            break
        beam = kept
        hidden, cell = hidden.numpy()[parents], cell.numpy()[parents]
    _, words = max(finished or beam)
    return [word for word in words if word not in (START, END)]


def unrolled(condition: Any, body: Any, state: Any, **_: Any) -> Any:
    """Stands in for a while loop with all of its steps written out."""
    for _step in range(LENGTH + 1):
        state = body(*state)
    return state


def seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """The fastest of some rounds."""
    fastest = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - begun)
    return fastest


def main(arguments: command.Arguments) -> None:
    """Measures."""
    command.import_keras()
    import keras
    import numpy as np

    from captioning import backend
    from captioning.data.vocabulary import END, PAD
    from captioning.decoding import captioner, search
    from model import CaptioningModel

    # As photographs are captioned, and not the drawn sample.
    fields = {**arguments.given, "dataset": "flickr8k"}
    config = resolve(Config(**fields), fields)
    precision = backend.set_precision(config)
    keras.utils.set_random_seed(0)
    decoder = CaptioningModel(WORDS, UNITS, UNITS, UNITS)
    decoder.build((None, None, CHANNELS))
    # Every caption has all of its words, so that no search gets off early.
    bias = np.zeros(WORDS, np.float32)
    bias[END] = -1e6
    decoder.logits.bias.assign(bias)
    random = np.random.default_rng(0)
    features = random.normal(size=(IMAGES, REGIONS, CHANNELS))
    features = features.astype(np.float16)

    rates, captions = {}, {}
    for name in ("while loop", "unrolled"):
        searcher = search.BeamSearch(decoder, BEAM, 0.0, 1, LENGTH)
        searcher.compile(jit_compile=backend.use_xla())
        loop = unrolled if name == "unrolled" else search.ops.while_loop
        with mock.patch.object(search.ops, "while_loop", loop):
            found = searcher.predict_on_batch(features)  # compiles it
            took = seconds(lambda s=searcher: s.predict_on_batch(features))
        captions[name] = np.asarray(found["words"])[:, 0]
        rates[name] = IMAGES / took
        print(f"{name:12} {rates[name]:7.1f} images/s ({precision})")
    configured = captioner.build(decoder, config)
    configured.predict_on_batch(features)
    took = seconds(lambda: configured.predict_on_batch(features))
    name = f"beam of {config.beam_size}"
    print(f"{name:12} {IMAGES / took:7.1f} images/s, as configured")
    few = 3
    ours = [[w for w in each if w != PAD] for each in captions["while loop"]]
    plainly = [plain(decoder, each) for each in features[:few]]
    took = seconds(lambda: [plain(decoder, e) for e in features[:few]], 2)
    same = sum(a == b for a, b in zip(ours, plainly, strict=False))
    rate = few / took
    print(f"{'one by one':12} {rate:7.1f} images/s, {same} of {few} the same")
    print(f"ratio        {rates['while loop'] / rate:7.1f}")
    if precision == "float32":
        assert same == few, "the searches do not agree"


if __name__ == "__main__":
    command.run(main, __doc__, {})
