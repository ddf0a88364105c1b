"""Self-critical training: sampled captions, weighted by their CIDEr-D.

Cross-entropy teaches the next word of a reference; what is scored is a whole
caption of the model. Here the decoder samples captions, and those that score
above the other samples of their image become likelier, the others less likely
(Rennie et al. 2017, equation 7; the baseline, the mean of the other samples, is
from Luo 2020, "A better variant of self-critical sequence training"). The
gradient is that of a weighted cross-entropy, so `Model.fit` trains it on every
backend.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops
from tqdm import tqdm

from captioning import job, runs
from captioning.backend import ALONE, one_device, use_xla
from captioning.data import vocabulary
from captioning.data.vocabulary import SPECIAL_WORDS
from captioning.decoding import captioner, search
from captioning.decoding.consensus import ORDERS, SIGMA
from captioning.features.joined import Features
from captioning.training.batches import CaptionBatches, choose_terraces
from captioning.training.callbacks import SavePoints
from captioning.training.objective import AdamW
from config import Config

# Images per round: their captions are sampled with the same weights.
ROUND_IMAGES = 4 * captioner.BATCH

END_WORD = SPECIAL_WORDS[vocabulary.END]

NGram = tuple[str, ...]


class _Weighed(NamedTuple):
    """A caption as tf-idf weights of its n-grams."""

    weights: dict[NGram, float]
    norms: list[float]  # of each order
    bigrams: int  # how many, which stands for the length


class CiderD:
    """CIDEr-D of training captions, one by one and fast.

    Vedantam et al. 2015, equations 1 to 4, as in pycocoevalcap, which scores
    only whole sets. The document frequencies are those of all training images.
    `<end>` counts as a word: otherwise captions learn to break off after "in
    a", which n-grams do not mind.

    Args:
        references: of each training image its tokenised captions.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]) -> None:
        self.references = references
        self.frequency: Counter[NGram] = Counter()
        for captions in references:
            self.frequency.update(set().union(*map(_ngrams, captions)))
        self.log_images = float(np.log(len(references)))

    def __call__(self, image: int, caption: Sequence[str]) -> float:
        """The score of a tokenised caption of an image, from 0 to 10."""
        made = self._weigh(caption)
        references = [self._weigh(each) for each in self.references[image]]
        return 10 * float(np.mean([_likeness(made, r) for r in references]))

    def _weigh(self, caption: Sequence[str]) -> _Weighed:
        counts = _ngrams(caption)
        weights, squares, bigrams = {}, [0.0] * ORDERS, 0
        for ngram, count in counts.items():
            seen = max(1, self.frequency[ngram])
            weight = count * (self.log_images - float(np.log(seen)))
            weights[ngram] = weight
            squares[len(ngram) - 1] += weight**2
            bigrams += count * (len(ngram) == 2)
        return _Weighed(weights, [each**0.5 for each in squares], bigrams)


def _ngrams(caption: Sequence[str]) -> Counter[NGram]:
    """Counts the n-grams of a caption with its `<end>`."""
    words = (*caption, END_WORD)
    return Counter(
        words[start : start + order]
        for order in range(1, ORDERS + 1)
        for start in range(len(words) - order + 1)
    )


def _likeness(made: _Weighed, reference: _Weighed) -> float:
    """The mean over orders of clipped cosines, less for another length."""
    products = [0.0] * ORDERS
    for ngram, weight in made.weights.items():
        other = reference.weights.get(ngram)
        if other is not None:
            products[len(ngram) - 1] += min(weight, other) * other
    cosines = [
        product / (one * other) if one and other else 0.0
        for product, one, other in zip(
            products, made.norms, reference.norms, strict=True
        )
    ]
    difference = made.bigrams - reference.bigrams
    return float(np.mean(cosines) * np.exp(-(difference**2) / (2 * SIGMA**2)))


def advantages(rewards: np.ndarray) -> np.ndarray:
    """How much better each sample is than the others of its image.

    Args:
        rewards: float (images, samples), at least two samples.

    Returns:
        Float (images, samples): the reward minus the mean of the others.
    """
    samples = rewards.shape[1]
    others = (rewards.sum(1, keepdims=True) - rewards) / (samples - 1)
    return rewards - others


class Rounds:
    """Samples captions of training images and makes batches of them.

    The samples depend on nothing but the decoder's weights, the seed, the epoch
    and the round, so a resumed run samples what it would have sampled.

    Args:
        config: its training fields.
        decoder: to sample from.
        features: of the training images.
        captions: the tokenised captions of each training image.
        words: the vocabulary.
    """

    def __init__(
        self,
        config: Config,
        decoder: keras.Model,
        features: Features,
        captions: Sequence[Sequence[Sequence[str]]],
        words: vocabulary.Vocabulary,
    ) -> None:
        self.config, self.features, self.words = config, features, words
        self.judge = CiderD(captions)
        # All rounds have the same terraces: other ones would be compiled again.
        # Those of the references, and room for the longest caption.
        samples = max(2, config.captions_per_image)
        lengths = [len(each) + 1 for image in captions for each in image]
        steps = config.max_caption_length + 1
        *first, last = choose_terraces(
            np.minimum(lengths, steps),
            config.batch_images * samples,
            use_xla(),
        )
        self.terraces = [*first, last._replace(last=steps)]
        self.sampler = search.Sample(
            decoder,
            # The baseline of a sample is the other samples.
            samples=samples,
            max_length=config.max_caption_length,
            seed=config.seed,
        )
        self.sampler.compile(jit_compile=use_xla())

    def __len__(self) -> int:
        """How many rounds an epoch has."""
        return -(-len(self.features) // ROUND_IMAGES)

    def sample(self, epoch: int, number: int) -> tuple[CaptionBatches, float]:
        """Samples the captions of a round.

        Args:
            epoch: of the run, from 0.
            number: of the round in it, from 0.

        Returns:
            The batches to train on, and the mean reward.
        """
        seeds = (self.config.seed, epoch)
        order = np.random.default_rng(seeds).permutation(len(self.features))
        images = order[number * ROUND_IMAGES : (number + 1) * ROUND_IMAGES]
        state = np.random.SeedSequence((*seeds, number)).generate_state(2)
        self.sampler.seed.state.assign(state)
        sampled = captioner.sample_images(
            self.sampler, self.features, images
        )  # (images, samples, steps)
        captions = [[*map(self.words.decode, each)] for each in sampled]
        rewards = np.array(
            [
                [self.judge(image, caption) for caption in each]
                for image, each in zip(images, captions, strict=True)
            ]
        )  # (images, samples)
        longest = self.config.max_caption_length
        rows = [vocabulary.encode(e, self.words, longest) for e in captions]
        for each in rows:
            # After the longest caption `<end>` was no choice.
            each[:, -1] = vocabulary.PAD
        # The loss is a sum: over about as many words in every batch.
        batches = -(-len(images) // self.config.batch_images)
        words = sum(np.count_nonzero(each[:, 1:]) for each in rows)
        importance = advantages(rewards) * batches / words
        return CaptionBatches(
            self.features.select(images),
            rows,
            self.config.batch_images,
            importance=[*importance],
            terraces=self.terraces,
        ), float(rewards.mean())


class PolicyLoss(keras.losses.Loss):
    """Negative log-probability of sampled words among those that can be.

    Summed with the weights of the tokens. `<unk>` and the like are left out:
    they are never sampled, so nothing would take back the probability that
    a bad caption loses to them.
    """

    def __init__(self) -> None:
        super().__init__(reduction="sum")

    def call(self, targets: Any, logits: Any) -> Any:
        """Targets (tokens,) and logits (tokens, vocabulary) -> (tokens,)."""
        logits = ops.cast(logits, "float32") + search.never(logits.shape[-1])
        return ops.sparse_categorical_crossentropy(
            targets, logits, from_logits=True
        )


def compile_decoder(config: Config, decoder: Any) -> None:
    """Compiles a decoder for self-critical training.

    Without regularisation: the captions are new every time, and dropout would
    judge another decoder than the one that they were sampled from.

    Args:
        config: its training fields.
        decoder: a `model.CaptioningModel`.
    """
    dropouts = ("annotation_dropout", "word_dropout", "output_dropout")
    for name in dropouts:
        getattr(decoder, name).rate = 0.0
    decoder.attention_regularisation = 0.0
    decoder.compile(
        AdamW(
            config.scst_learning_rate,
            weight_decay=0.0,
            global_clipnorm=config.clip_norm or None,
        ),
        PolicyLoss(),
        jit_compile=use_xla(),
    )


def train(
    config: Config,
    points: SavePoints,
    features: Features,
    captions: Sequence[Sequence[Sequence[str]]],
    words: vocabulary.Vocabulary,
) -> None:
    """Trains from the best epoch of cross-entropy on, or resumes that.

    Args:
        config: its training fields.
        points: where training stands.
        features: of the training images.
        captions: the tokenised captions of each training image.
        words: the vocabulary.
    """
    job.wait("self-critical")  # the first process may still be writing
    with one_device():
        # Sampling and scoring are not shared out: every process does all of it,
        # with the same result.
        judge, measure = points.judge, points.judge.measure
        decoder = measure.decoder = measure.captioner
        measure.devices = ALONE
        judge.set_model(decoder)
        points.set_model(decoder)
        compile_decoder(config, decoder)
        decoder.optimizer.build(decoder.trainable_variables)
        if points.self_critical:
            runs.load_state(points.place, points.variables())
        else:
            runs.load_weights(decoder, points.place)
            points.begin_self_critical()
        rounds = Rounds(config, decoder, features, captions, words)
        done = points.self_critical_epochs()
        end = points.epoch - done + config.scst_epochs
        for epoch in range(points.epoch, end):
            points.start(epoch)
            _run_rounds(decoder, rounds, points)
            logs = {"reward": sum(points.rewards) / len(rounds)}
            judge.judge(epoch, logs)
            points.on_epoch_end(epoch, logs)
            print(
                f"Self-critical epoch {epoch + 1}/{end}: reward "
                f"{logs['reward']:.3f}, CIDEr on val {logs['val_cider']:.3f}",
                flush=True,
            )


def _run_rounds(
    decoder: keras.Model, rounds: Rounds, points: SavePoints
) -> None:
    """Trains on the rounds that are left of an epoch."""
    bar = tqdm(
        total=len(rounds),
        initial=points.batch,
        unit="round",
        disable=not sys.stderr.isatty(),
    )
    with bar:
        while points.batch < len(rounds):
            batches, reward = rounds.sample(points.epoch, points.batch)
            fitted = decoder.fit(batches, shuffle=False, verbose=0)
            points.batch += 1
            points.rewards.append(reward)
            points.check(fitted.history["loss"][0])
            if points.batch < len(rounds):
                points.save_if_due()
            bar.set_postfix(reward=f"{reward:.3f}")
            bar.update()
