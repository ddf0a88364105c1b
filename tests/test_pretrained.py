"""The run that comes with the project, with a local file of the weights."""

import json
from pathlib import Path

import pytest

from captioning import runs
from captioning.features import encoder_weights
from captioning.scoring import metrics
from config import each_encoder
from tests.scripts import ROOT, run

PLACE = ROOT / "checkpoints" / runs.PRETRAINED
MOST = 20_000_000  # bytes in the repository


@pytest.fixture(scope="module")
def weights(real_data) -> str:
    """The encoder's weights file; the test needs no network."""
    names = [name for name, _ in each_encoder(runs.load_config(PLACE))]
    files = [real_data / "weights" / f"{n}_notop.weights.h5" for n in names]
    return ",".join(map(str, files))


def test_it_is_small_and_needs_only_what_keras_downloads():
    assert sum(x.stat().st_size for x in PLACE.iterdir()) < MOST
    config = runs.load_config(PLACE)
    assert config.run_name == PLACE.name and not config.dataset_dir
    descriptions = runs.load_description(PLACE).encoders
    encoder_weights.check(config, descriptions)
    for name, imagenet in each_encoder(config):
        assert encoder_weights.fingerprint(name, imagenet) != imagenet


def test_it_captions_photographs_where_no_other_run_does(
    real_data, weights, tmp_path
):
    """What it says of photographs that it has not seen fits most of them."""
    splits = real_data / "data" / "flickr8k" / "splits"
    names = (splits / "Flickr_8k.devImages.txt").read_text().split()[:12]
    told: dict[str, list[str]] = {name: [] for name in names}
    table = real_data / "data" / "flickr8k" / "Flickr8k.token.txt"
    for line in table.read_text().splitlines():
        name, _, text = line.partition("#")
        if name in told:
            told[name].append(text.partition("\t")[2].lower())
    photos = [real_data / "data" / "flickr8k" / "Images" / n for n in names]
    done = run(
        "caption.py",
        *photos,
        "--checkpoints-dir",
        ROOT / "checkpoints",
        "--encoder-weights",
        weights,
        "--json",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert f"the run {runs.PRETRAINED}" in done.stderr
    entries = map(json.loads, done.stdout.splitlines())
    captions = {Path(x["photo"]).name: x["caption"] for x in entries}
    assert len({*captions.values()}) > 8
    # Far above what captions of other photographs reach.
    mixed = dict(zip(captions, [*captions.values()][::-1], strict=True))
    scores = [metrics.cider(each, told) for each in (captions, mixed)]
    assert scores[0] > 3 * scores[1]
