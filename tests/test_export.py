"""The exported program, in a process without the project's code."""

import dataclasses
import json
import subprocess
import sys

import keras
import numpy as np
import pytest

import evaluate
import model
from captioning import runs
from captioning.backend import TENSORFLOW
from captioning.data import prepared, vocabulary
from captioning.data.vocabulary import END, SPECIAL_WORDS, Vocabulary
from captioning.features import encoder_weights, store
from captioning.scoring import evaluation
from config import Config
from tests.helpers import refusal

# Prints the captions and scores of the images in a file.
PROGRAM = """
import json, sys
import numpy as np, tensorflow as tf
program = tf.saved_model.load(sys.argv[1])
found = program.serve(np.load(sys.argv[2]))
captions = [
    " ".join(word.decode() for word in words if word)
    for words in found["words"].numpy()
]
ours = {"model", "config", "captioning", "evaluate"} & set(sys.modules)
assert not ours and found["word_ids"].dtype == tf.int32
print(json.dumps([captions, found["scores"].numpy().tolist()]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run with features of its encoder: config, place, pixels.

    In bfloat16: an export in float32 does nothing that this one does not.
    """
    home = tmp_path_factory.mktemp("home")
    config = Config(
        checkpoints_dir=str(home),
        run_name="run",
        encoder="scenes",
        encoder_weights="random",
        image_size=64,
        magnification=1,
        batch_images=4,
        decoder_units=16,
        attention_units=16,
        embedding_units=16,
        max_caption_length=5,
        precision="mixed_bfloat16",
    )
    keras.config.set_dtype_policy(config.precision)
    keras.utils.set_random_seed(1)
    words = Vocabulary((*SPECIAL_WORDS, *"abcdefgh", "é"))
    encoder = model.build_encoder(config)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 64, 64, 3), np.uint8)
    pixels //= np.array([1, 2, 4, 8, 16, 32], np.uint8)[:, None, None, None]
    features = encoder.predict(pixels, verbose=0)
    decoder = model.build_model(config, len(words), features.shape[2])
    decoder.set_weights([4 * each for each in decoder.get_weights()])
    decoder.standardisation.mean.assign(features.mean((0, 1), np.float32))
    deviation = features.std((0, 1), np.float32)
    decoder.standardisation.deviation.assign(deviation + 1e-4)
    bias = decoder.logits.bias
    bias.assign(np.where(np.arange(len(words)) == END, -3, np.array(bias)))
    place = home / "run"
    description = encoder_weights.describe_features(config)
    images = runs.digest_images([], np.zeros((0, 16), np.uint8))
    shape = features.shape[1:]
    runs.begin(config, place, words, description, shape, images)
    runs.save_weights(decoder, place, 1)
    return config, place, pixels, features


@pytest.mark.skipif(not TENSORFLOW, reason="a SavedModel is TensorFlow's")
def test_the_program_captions_as_evaluate_does(run, tmp_path, monkeypatch):
    config, place, pixels, features = run
    rows = np.arange(len(features))
    monkeypatch.setattr(store, "open_features", lambda *_: features)
    words = vocabulary.load(place / "vocabulary.json").words[4:]
    split = prepared.Split(
        list(rows), list(rows), [], [[[words[0]]]] * len(rows)
    )
    captioned, *_ = evaluation.caption_split([(config, place)], split)
    found = [*captioned.values()]
    assert len({each.caption for each in found}) > 1
    evaluate.export_run([(config, place)], tmp_path / "program")
    np.save(tmp_path / "pixels.npy", pixels)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
            tmp_path / "program",
            tmp_path / "pixels.npy",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    captions, scores = json.loads(done.stdout)
    assert captions == [each.caption for each in found]
    np.testing.assert_allclose(
        scores,
        [each.n_best[0].score for each in found],
        rtol=1e-5,  # float32, and the two programs round differently
        atol=1e-4,
    )
    assert not list(tmp_path.glob("tmp*")), "temporary folders are left"


@pytest.mark.skipif(TENSORFLOW, reason="TensorFlow can")
def test_another_backend_refuses_to_export(run, tmp_path):
    config, place, *_ = run
    program = tmp_path / "program"
    told = refusal(evaluate.export_run, [(config, place)], program)
    assert "KERAS_BACKEND=tensorflow" in told


@pytest.mark.skipif(not TENSORFLOW, reason="it refuses whatever is asked")
def test_what_cannot_be_exported_is_told_in_one_line(run, tmp_path):
    config, place, *_ = run
    wrong = dataclasses.replace(config, encoder_weights="nothing.h5")
    for members, folder, told in (
        ([(config, place)], tmp_path, "already exists"),
        ([(config, place)] * 2, tmp_path / "program", "one run"),
        ([(wrong, place)], tmp_path / "program", "nothing.h5"),
    ):
        assert told in refusal(evaluate.export_run, members, folder)
