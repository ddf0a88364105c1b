"""Which epoch is the best, and when a run ends for want of a better one."""

import contextlib
import dataclasses
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

from captioning import runs
from captioning.backend import TENSORFLOW, set_seed
from captioning.training import callbacks, objective
from captioning.training.schedule import Schedule, choose_epochs
from config import Config, UserError


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Judges epochs; gives the epochs that were kept, and the callback."""

    def judge_epochs(epochs, patience=4, by_loss=False):
        kept = []
        monkeypatch.setattr(
            runs, "save_weights", lambda model, place, epoch: kept.append(epoch)
        )
        ciders = iter([cider for cider, _ in epochs])
        callback = callbacks.Judge(
            lambda: next(ciders),
            tmp_path,
            1,
            patience,
            len(epochs),
            by_loss=by_loss,
        )
        callback.averaged = contextlib.nullcontext()
        model = type("Model", (), {"stop_training": False})()
        keras.callbacks.Callback.set_model(callback, model)
        for number, (_, loss) in enumerate(epochs):
            logs = {} if loss is None else {"val_loss": loss}
            callback.on_epoch_end(number, logs)
            if callback.model.stop_training:
                break
        return kept, callback

    return judge_epochs


def test_characters_are_judged_as_such(monkeypatch):
    """Though captions have no spaces between them."""
    tokens = [[[*"红球在跑"]], [[*"蓝猫睡了"]]]
    found = [
        SimpleNamespace(words=each, caption="".join(each)) for (each,) in tokens
    ]
    built = []
    monkeypatch.setattr(
        callbacks.captioner, "build", lambda _, config: built.append(config)
    )
    monkeypatch.setattr(callbacks.captioner, "caption_images", lambda *_: found)
    split = SimpleNamespace(images=["a", "b"], tokens=tokens)
    features, config = np.ones(2), Config()
    measure = callbacks.ValidationCider(config, None, features, split, None)
    assert measure() == pytest.approx(10)
    assert built == [dataclasses.replace(config, consensus_samples=0)]


def test_the_highest_cider_is_the_best(judge):
    kept, callback = judge([(0.1, 3), (0.3, 4), (0.2, 1), (0.4, 5)])
    assert kept == [1, 2, 4]
    assert str(callback) == "best CIDEr on val: 0.400, epoch 4"


def test_of_equal_cider_the_lower_loss_is_the_better(judge):
    kept, callback = judge([(0.0, 5), (0.0, 4), (0.0, 4.5), (0.0, 3)])
    assert kept == [1, 2, 4] and callback.since_best == 0


def test_equal_cider_is_no_failure(judge):
    worse = [(0.0, 5 + n) for n in range(9)]
    kept, callback = judge(worse, patience=2)
    assert kept == [1] and not callback.stopped


def test_patience_counts_measurements_without_a_better_one(judge):
    epochs = [(0.3, 1), (0.2, 1), (0.3, 1), (0.1, 1), (0.4, 1)]
    kept, callback = judge(epochs, patience=2)
    assert kept == [1] and callback.stopped and callback.since_best == 2


def test_where_cider_cannot_judge_the_loss_does(judge):
    epochs = [(0.0, 5), (0.9, 6), (0.0, 4), (0.9, 4), (0.9, 7), (0.0, 1)]
    kept, callback = judge(epochs, patience=2, by_loss=True)
    assert kept == [1, 3] and callback.stopped
    assert str(callback) == "lowest loss on val: 4.000, epoch 3"


def test_self_critical_epochs_without_a_loss(judge):
    """CIDEr judges them; where it cannot, the last one is kept."""
    epochs = [(0.3, 5), (0.2, None), (0.3, None), (0.4, None)]
    assert judge(epochs)[0] == [1, 4]
    assert judge(epochs, by_loss=True)[0] == [1, 2, 3, 4]


def test_measuring_changes_no_weight():
    """The averaged weights are measured, and the trained ones come back."""
    generator = np.random.default_rng(0)
    data = generator.normal(size=(8, 2)), generator.normal(size=8)
    weights = []
    for measured in (data, None):
        set_seed(0)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(objective.AdamW(0.1, use_ema=True), "mse")
        averaged = callbacks.Averaged()
        for _ in range(2):
            model.fit(
                *data,
                epochs=2,
                batch_size=4,
                shuffle=False,
                verbose=0,
                validation_data=measured,
                callbacks=[averaged],
            )
        weights.append(model.get_weights())
        with averaged:
            assert not np.array_equal(model.get_weights()[0], weights[-1][0])
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_patience_goes_by_comes_back(tmp_path):
    """A run that is resumed stops when the undisturbed one would."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    saved, restored = (
        callbacks.Judge(lambda: 0.0, tmp_path, 1, 4, 9) for _ in range(2)
    )
    saved.best, saved.best_loss = 0.3, 4.5
    saved.best_epoch, saved.since_best = 2, 3
    points = callbacks.SavePoints(tmp_path, None, saved)
    points.scheduled_epochs = 7
    points.set_model(model)
    points.start(5)
    points.save()
    again = callbacks.SavePoints(tmp_path, None, restored)
    again.restore()
    assert again.epoch == 5 and again.scheduled_epochs == 7
    assert vars(restored).keys() == vars(saved).keys()
    for name in callbacks.BEST:
        assert getattr(restored, name) == getattr(saved, name) != 0
    points.epoch = 0
    points.save()
    again.restore()
    assert again.scheduled_epochs == 9  # no step has followed the other


def test_a_state_of_another_version_is_refused_in_one_line(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    runs.save_state(tmp_path, model.variables, {"epoch": 1})
    judge = callbacks.Judge(lambda: 0.0, tmp_path, 1, 4, 9)
    points = callbacks.SavePoints(tmp_path, None, judge)
    with pytest.raises(UserError, match=r"state\.npz cannot be read.*--fresh"):
        points.restore()


def test_the_rate_warms_up_decays_and_then_stays_low():
    rate = Schedule(0.01, steps=20, epochs=8, warmup_share=0.05)
    found = np.array([float(rate(step)) for step in range(170)])
    assert found[:9].argmax() == 8 and found[8] == pytest.approx(0.01)
    assert (np.diff(found[8:161]) < 0).all() and found[160] < 1e-9
    last = found[140:160].mean()
    np.testing.assert_allclose(found[161:], last, rtol=0.1)


def test_a_schedule_of_a_single_step_is_a_number():
    rate = Schedule(0.01, steps=1, epochs=1, warmup_share=0.05)
    assert all(math.isfinite(float(rate(step))) for step in range(3))


@pytest.mark.parametrize(
    ("images", "epochs"),
    [(1, 30), (300, 30), (2000, 24), (6000, 8), (29_000, 8)],
)
def test_a_small_dataset_is_trained_for_more_epochs(images, epochs):
    assert choose_epochs(images, 32) == epochs


@pytest.mark.skipif(not TENSORFLOW, reason="TensorFlow writes the logs")
def test_tensorboard_shows_captions_with_their_photographs(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = SimpleNamespace(
        words=["a", "dog"], caption="a dog", attention=np.full((2, 4), 0.25)
    )
    measure = SimpleNamespace(
        split=SimpleNamespace(images=["a.png", "gone.png", "c.png"]),
        first=[found, found],
    )
    shown = callbacks.ShownCaptions(measure, tmp_path, tmp_path / "logs")
    shown.on_epoch_end(0, {"loss": 1.0})
    assert not (tmp_path / "logs").exists()  # nothing was captioned
    shown.on_epoch_end(1, {"val_cider": 0.5})
    logs = event_accumulator.EventAccumulator(str(tmp_path / "logs/captions"))
    logs.Reload()
    tags = logs.Tags()["tensors"]
    plugins = {
        tag: logs.SummaryMetadata(tag).plugin_data.plugin_name for tag in tags
    }
    assert plugins == {"a.png/attention": "images", "a.png/caption": "text"}
    assert {each.step for tag in tags for each in logs.Tensors(tag)} == {2}
