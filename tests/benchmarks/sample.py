"""How many captions of the sample name only what is there.

    python tests/benchmarks/sample.py [flags of evaluate.py]

Run evaluate.py with the same flags first. A caption is right if every object
and every colour in it is in the scene, and every colour before an object is
that object's. Prints the share, and what is wrong with the others.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from captioning import command, runs  # noqa: E402
from captioning.data import sample  # noqa: E402


def wrong(caption: str, scene: sample.Scene) -> str:
    """What a caption names that is not there; empty if nothing."""
    there = {each.kind: each.colour for each in scene.groups}
    words = [re.sub(r"(?<=x)es$|s$", "", word) for word in caption.split()]
    for before, word in zip(["", *words], words, strict=False):
        if word in sample.KINDS and word not in there:
            return "an object that is not there"
        if word in sample.COLOURS and word not in there.values():
            return "a colour that is not there"
        named = before in sample.COLOURS and word in sample.KINDS
        if named and there[word] != before:
            return "the colour of another object"
    return ""


def main(arguments: command.Arguments) -> None:
    """Judges the captions of an evaluation."""
    config = arguments.config
    place = runs.folder(config) / "evaluation" / config.split
    captions = json.loads((place / "captions.json").read_text())
    faults = []
    for each in captions:
        number = int(re.sub(r"\D", "", each["image_id"]))
        random = np.random.default_rng([sample.SEED, number])
        faults.append(wrong(each["caption"], sample.scene(random)))
    right = faults.count("") / len(faults)
    print(f"{right:.1%} of {len(faults)} captions name only what is there")
    for fault in sorted({*faults} - {""}):
        print(f"  {faults.count(fault) / len(faults):6.1%} name {fault}")


if __name__ == "__main__":
    command.run(main, __doc__, {})
