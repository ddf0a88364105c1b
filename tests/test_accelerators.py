"""What is different where there is a GPU, on machines that have none."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest

from captioning import backend
from captioning.backend import TENSORFLOW
from captioning.data.vocabulary import END, PAD, START
from captioning.decoding import captioner
from captioning.training import loop
from captioning.training.batches import CaptionBatches
from captioning.training.objective import SmoothedCrossEntropy
from config import Config
from model import CaptioningModel

pytestmark = pytest.mark.usefixtures("float32")
REGIONS, CHANNELS, WORDS = 3, 4, 9


@pytest.fixture
def gpus(monkeypatch):
    """Has the backend find GPUs of some capabilities."""

    def find(*capabilities: str) -> None:
        devices = [SimpleNamespace(compute_capability=c) for c in capabilities]
        monkeypatch.setattr(backend, "accelerators", lambda: devices)
        if TENSORFLOW:
            import tensorflow as tf

            def details(device):
                numbers = device.compute_capability.split(".")
                return {"compute_capability": tuple(map(int, numbers))}

            monkeypatch.setattr(
                tf.config.experimental, "get_device_details", details
            )

    return find


def make_batches(**options) -> CaptionBatches:
    """Captions of one word and of two, that make batches of two lengths."""
    short, long = [START, END, PAD], [START, 5, END]
    generator = np.random.default_rng(0)
    captions = [
        np.array([short if chance < 0.5 else long] * 2, np.int32)
        for chance in generator.random(400)
    ]
    shape = (400, REGIONS, CHANNELS)
    features = generator.normal(size=shape).astype(np.float16)
    return CaptionBatches(features, captions, 100, **options)


def tiny() -> CaptioningModel:
    keras.utils.set_random_seed(2)
    decoder = CaptioningModel(WORDS, 5, 5, 5)
    decoder.build((None, None, CHANNELS))
    return decoder


@pytest.mark.parametrize(
    ("capabilities", "policy"),
    [
        (["7.5"], "float32"),
        (["8.0"], "mixed_bfloat16"),
        (["12.0"], "mixed_bfloat16"),
        (["9.0", "7.5"], "float32"),
    ],
)
def test_gpus_compute_in_bfloat16_if_all_of_them_can(
    gpus, capabilities, policy
):
    gpus(*capabilities)
    assert backend.set_precision(Config()) == policy
    assert keras.config.dtype_policy().name == policy


def test_on_gpus_xla_compiles_training_and_search(gpus):
    gpus("9.0")
    config, decoder = Config(ema_epochs=0), tiny()
    loop.compile_decoder(decoder, config, 0.001, 1)
    assert decoder.jit_compile
    assert captioner.build(decoder, config).jit_compile


def test_on_gpus_all_batches_are_of_one_size_and_compiled_once(gpus):
    def shapes(batches):
        return {
            tuple(each.shape for each in keras.tree.flatten(batches[place]))
            for place in range(len(batches))
        }

    assert len(shapes(make_batches(static=False))) > 1
    gpus("9.0")
    assert len(shapes(make_batches())) == 1


@pytest.mark.skipif(not TENSORFLOW, reason="JAX trains on all of them")
def test_tensorflow_says_that_it_trains_on_one_gpu(gpus, capsys):
    for capabilities, told in (
        ([], 0),
        (["9.0"], 0),
        (["9.0"] * 3, 1),
    ):
        gpus(*capabilities)
        with backend.all_devices() as devices:
            assert devices == backend.ALONE
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == told
    assert "2 more" in err and "KERAS_BACKEND=jax" in err


@pytest.mark.skipif(not TENSORFLOW, reason="JAX compiles with XLA alone")
def test_a_step_that_xla_compiles_is_the_step_that_tensorflow_does():
    found = []
    for xla in (True, False):
        decoder = tiny()
        decoder.compile(
            keras.optimizers.SGD(1.0),
            SmoothedCrossEntropy(0.1),
            jit_compile=xla,
            run_eagerly=not xla,
        )
        decoder.train_on_batch(*make_batches(static=True)[1])
        found.append(decoder.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
