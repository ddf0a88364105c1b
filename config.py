"""Every hyperparameter, in one frozen dataclass.

Change a default here, or give any field as a flag to any of the scripts:
`python train.py --batch-images 32 --seed 1`.

What the defaults give: on Flickr8k's validation split, with the flags that
docs/results.md names, CIDEr 0.630, BLEU-4 23.3 and 42.0% token accuracy
(2026-12-01, bfloat16). On two CPU cores that multiply bfloat16, preprocess.py
and train.py take about twenty minutes each and evaluate.py four; with AVX2
alone, about four times as long.
Training takes 2 GB of memory, and reads 2.8 GB of features that are best cached
in memory too.
docs/experiments.md says what was tried and what each change gained.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class UserError(Exception):
    """Something the user can put right, told in one line.

    The message says what is wrong, where, and what to do next. Every script
    prints it on standard error and exits with code 1.
    """


class Encoder(NamedTuple):
    """One line of the table of encoders."""

    application: str  # class in keras.applications; empty: ours
    module: str  # module in keras.applications with its preprocess_input
    # The layer whose output is cached as annotation vectors; LAST is the last
    # one, for networks in which Keras names it differently every time.
    layer: str
    # A digest of Keras's ImageNet weights, where we had them, by which a local
    # file of the same weights is recognised.
    imagenet: str = "imagenet"


LAST = "output"
# The encoder of drawn scenes, and the name of its weights: a small network
# that was trained on scenes which are not in the sample (docs/scenes.py).
SCENES = "scenes"
# The name that --encoder takes -> where Keras Applications has it. A new
# encoder is one line here. VGG's block5_conv3 is the layer that Show, Attend
# and Tell uses (Xu et al. 2015, section 4.3); the others have their last
# feature map.
ENCODERS = {
    "vgg16": Encoder("VGG16", "vgg16", "block5_conv3", "half-5a8b16138f31d63e"),
    "vgg19": Encoder("VGG19", "vgg19", "block5_conv4"),
    "resnet50": Encoder("ResNet50", "resnet50", "conv5_block3_out"),
    "resnet101": Encoder("ResNet101", "resnet", "conv5_block3_out"),
    "resnet152": Encoder("ResNet152", "resnet", "conv5_block3_out"),
    "resnet50v2": Encoder("ResNet50V2", "resnet_v2", "post_relu"),
    "resnet101v2": Encoder("ResNet101V2", "resnet_v2", "post_relu"),
    "resnet152v2": Encoder("ResNet152V2", "resnet_v2", "post_relu"),
    "xception": Encoder(
        "Xception",
        "xception",
        "block14_sepconv2_act",
        "half-35bc8bec29220e03",
    ),
    "mobilenetv2": Encoder("MobileNetV2", "mobilenet_v2", "out_relu"),
    **{
        f"efficientnetv2{size.lower()}": Encoder(
            f"EfficientNetV2{size}", "efficientnet_v2", "top_activation"
        )
        for size in ("B0", "B1", "B2", "B3", "S", "M", "L")
    },
    **{
        f"convnext{size.lower()}": Encoder(f"ConvNeXt{size}", "convnext", LAST)
        for size in ("Tiny", "Small", "Base", "Large", "XLarge")
    },
    # Ours, in captioning/features/networks.py; takes pixels from -1 to 1.
    SCENES: Encoder("", "mobilenet_v2", LAST),
}
LAYOUTS = (
    "auto",
    "karpathy",
    "huggingface",
    "coco",
    "plain",
    "kaggle30k",
    "kaggle8k",
    "token",
    "imagefolder",
    "sidecar",
)
# What a token is: a word, or in a script without spaces each character.
WORDS, CHARACTERS = "words", "characters"
TOKENISERS = ("auto", WORDS, CHARACTERS)
PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")
SPLITS = ("train", "val", "test")
SPLIT_SYNONYMS = {"dev": "val", "validation": "val", "valid": "val"}
SAMPLE = "sample"  # the dataset that is drawn on the spot

# Values that leave a choice open: epochs to the number of training images,
# precision to the machine, tokeniser to the training captions, all others to
# `resolve`.
OPEN: dict[str, Any] = {
    "run_name": "",
    "encoder_weights": "auto",
    "precision": "auto",
    "epochs": 0,
    "tokeniser": "auto",
}

# Names that a folder can have on every platform and that lead nowhere else:
# no separator, no drive, no dots at the ends, no device of Windows.
_PLAIN = re.compile(
    r"(?![. ]|(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$))"
    r'[^<>:"/\\|?*\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,120}(?<![. ])',
    re.IGNORECASE,
)
# What to give instead of a name that is refused.
_INSTEAD = {
    "dataset": "another name with --dataset, and its folder with --dataset-dir",
    "run_name": "one, and the folder of the runs with --checkpoints-dir",
}


def _field(
    group: str,  # says what a change means
    default: Any,
    text: str,  # for --help
    least: float | None = None,
    most: float | None = None,
    choices: Sequence[str] = (),
    joined: bool = False,  # whether `+` joins several of them
    sample: Any = None,  # the default for the sample, if another
) -> Any:
    """Makes a field of Config."""
    said = {"group": group, "help": text, "sample": sample}
    limits = {"least": least, "most": most, "choices": choices}
    metadata = {**said, **limits, "joined": joined}
    return field(default=default, metadata=metadata)


GROUPS = ("place", "data", "encoder", "model", "training", "decoding")
_place, _data, _encoder, _model, _training, _decoding = (
    functools.partial(_field, name) for name in GROUPS
)


@dataclass(frozen=True)
class Config:
    """The hyperparameters of one run.

    Where a field says `sample=`, that is its default for the sample: drawn
    scenes are simpler than photographs, and a small decoder with little
    dropout learns to describe them in minutes.

    Raises:
        UserError: if a value is outside the limits of its field.
    """

    # --- place: where things are and what is tolerated; results stay the same
    data_dir: str = _place("data", "root of the datasets and caches")
    checkpoints_dir: str = _place("checkpoints", "root of the run folders")
    # If given alone, the dataset takes the folder's name.
    dataset_dir: str = _place("", "the dataset's folder, if not data/<dataset>")
    run_name: str = _place("", "run folder (empty: <dataset>-<encoder>)")
    # One broken photograph in twenty is an accident; more is a wrong folder
    # or a download that stopped half-way.
    max_skipped_share: float = _place(
        0.05, "stop if a larger share of the images is unusable", 0, 1
    )

    # --- data: which captions and which words; another text folder in the cache
    # The sample needs no download: it is drawn on the spot.
    dataset: str = _data(SAMPLE, "'sample', or the name of a folder in data/")
    # A folder may hold the same captions in two layouts; see data/README.md.
    layout: str = _data("auto", "layout of the captions", choices=LAYOUTS)
    # For a quick trial.
    limit_images: int = _data(0, "first N images of each split (0: all)", 0)
    # Chinese, Japanese or Thai as people write it has no words to split at.
    tokeniser: str = _data(
        "auto",
        "what a token is ('auto': characters if the training captions have no "
        "spaces between words, else words)",
        choices=TOKENISERS,
    )
    # Rarer words cannot be learned from 30,000 captions and cost time in the
    # output layer; 4 keeps 97% of Flickr8k's words.
    min_word_count: int = _data(
        4, "drop tokens that occur less often in train", 1
    )
    # 98% of Flickr8k's captions are shorter, and the decoder's loop takes as
    # many steps as the longest caption has tokens.
    max_caption_length: int = _data(20, "tokens; the rest is cut off", 1, 100)
    # For datasets without a split of their own: about 1,600 images each of
    # Flickr30k, enough to tell two models apart.
    val_share: float = _data(0.05, "val's share if there is no split", 0, 1)
    test_share: float = _data(0.05, "test's share if there is no split", 0, 1)

    # --- encoder: which image features; another feature folder in the cache
    # Two networks see more than one: CIDEr is 0.600 instead of 0.562 with
    # Xception or 0.578 with ResNet50 alone. Encoding, done once, takes twice as
    # long and twice the disk. The sample's drawn scenes need only a small
    # network.
    encoder: str = _encoder(
        "resnet50+xception",
        "frozen encoder, or several joined by +",
        choices=(*ENCODERS,),
        joined=True,
        sample=SCENES,
    )
    encoder_weights: str = _encoder(
        "auto",
        "'imagenet', 'scenes', 'random' or a weights file ('auto': scenes for "
        "the encoder scenes; for others imagenet, or random on the sample); "
        "with several encoders, one for all or one each, separated by commas",
    )
    # The size that most of the encoders were trained on.
    image_size: int = _encoder(
        224,
        "side in pixels, before magnification; images are resized, not cropped",
        32,
        2048,
    )
    # The encoder sees more in a photograph that is enlarged. Its regions are
    # averaged back to those of image_size, so that nothing after it is slower.
    # The sample's objects are drawn large already.
    magnification: int = _encoder(
        2, "enlarge images this many times", 1, 8, sample=1
    )

    # --- model: the shape of the decoder; fixed once a run is trained
    # 512 is what the models we compare with use; the word embeddings are as
    # wide, so that the deep output adds all three without another projection.
    embedding_units: int = _model(
        512, "width of a word embedding", 1, sample=128
    )
    attention_units: int = _model(
        512, "width of attention keys and queries", 1, sample=128
    )
    decoder_units: int = _model(
        512, "width of LSTM and annotation vectors", 1, sample=128
    )
    # A word's embedding begins near zero, and most words are too rare to move
    # it far at the rate of the other weights: docs/experiments.md. The decoder
    # multiplies by it, in captioning too.
    embedding_rate: float = _model(
        16.0, "the word embeddings' rate, as a multiple of learning_rate", 0.01
    )

    # --- training: fixed once a run has begun, but for epochs and patience
    # On Flickr8k the validation loss is lowest after seven epochs of a
    # schedule of twelve; eight lets the learning rate fall in time. A small
    # dataset has few steps to an epoch and needs more of them. The rate falls
    # over the epochs that a run begins with. If they are lowered later, the run
    # ends before that; if they are raised, the rest are trained at the average
    # rate of the last scheduled epoch, which fine-tunes and is not the same as
    # a longer schedule.
    epochs: int = _training(
        0,
        "passes over the training captions (0: 8, or up to 30 if few)",
        0,
    )
    # Counted in measurements of CIDEr, not in epochs. Ties are broken by the
    # validation loss and never count against a run; if fewer than twenty
    # validation images make CIDEr a matter of chance, the loss alone decides.
    patience: int = _training(4, "stop after N CIDEr values below the best", 1)
    # Every image brings all of its captions, so that its keys are computed
    # once: 32 images are 160 captions per step.
    batch_images: int = _training(32, "images per training step", 1, sample=16)
    captions_per_image: int = _training(
        5, "captions per image and step; the others follow in later epochs", 1
    )
    # Higher rates raise the token accuracy a little further, and lower the
    # scores of the captions: docs/experiments.md.
    learning_rate: float = _training(
        1e-3, "peak rate, after the warm-up", 0, sample=3e-3
    )
    # Adam's second moments need some hundred steps before they are worth
    # following at full speed.
    warmup_share: float = _training(0.05, "share of steps that warm up", 0, 1)
    weight_decay: float = _training(0.01, "AdamW's decoupled weight decay", 0)
    clip_norm: float = _training(5.0, "clip gradients to this global norm", 0)
    # Captions differ from each other: one-hot targets are overconfident.
    label_smoothing: float = _training(
        0.1, "share of the target spread over all words", 0, 1
    )
    # Xu et al. 2015, equation 14: over a caption, each region's attention
    # should sum to about as much as any other's.
    attention_regularisation: float = _training(
        1.0, "weight of the doubly stochastic attention penalty", 0
    )
    # With less, the model overfits Flickr8k's 30,000 captions.
    word_dropout: float = _training(
        0.4,
        "dropout on word embeddings and annotation vectors",
        0,
        0.95,
        sample=0.1,
    )
    output_dropout: float = _training(
        0.5, "dropout before the output layer", 0, 0.95, sample=0.1
    )
    # Averaged weights caption better than the last ones; counted in epochs so
    # that it suits any dataset.
    ema_epochs: float = _training(
        1.0, "epochs that weights are averaged over (0: none)", 0, 100
    )
    # Captioning the validation split takes a tenth of an epoch of Flickr8k: it
    # does without samples, which would take as long as an epoch.
    cider_every: int = _training(2, "epochs between measurements of CIDEr", 1)
    # From the best epoch on, sampled captions are rewarded (Rennie et al.
    # 2017). None by default: Flickr8k gains nothing, see docs/experiments.md.
    scst_epochs: int = _training(0, "epochs of self-critical training", 0)
    # Rewards are noisy: small steps.
    scst_learning_rate: float = _training(
        5e-5, "learning rate of self-critical training", 0
    )
    seed: int = _training(
        0, "random seed of weights, dropout and data order", 0, 2**32 - 1
    )
    # auto: bfloat16 where the processor multiplies it in hardware.
    precision: str = _training(
        "auto", "precision of encoder and decoder", choices=PRECISIONS
    )

    # --- decoding: how captions are searched for and scored; always free
    # Twenty give the consensus below something to choose from; the likeliest
    # caption of a beam gets worse beyond five.
    beam_size: int = _decoding(20, "hypotheses per step (1: greedy)", 1, 100)
    # GNMT's length penalty (Wu et al. 2016, equation 14). At 1 captions are as
    # long as greedy ones; at 0.7 they are shorter, and METEOR is lower.
    length_exponent: float = _decoding(
        1.0, "exponent of the length normalisation", 0, 5
    )
    # The likeliest caption rarely scores best; the one most like everything the
    # decoder would say of the image does. See captioning/decoding/consensus.py.
    # For drawn scenes, likelier captions are right more often, so they count
    # for more.
    consensus_temperature: float = _decoding(
        5.0,
        "rerank the beam by similarity to other captions; those of the beam "
        "count by probability ^ (1 / temperature) (0: take the likeliest)",
        0,
        sample=1.0,
    )
    # More samples choose better and take longer: a hundred take as long as
    # encoding the photograph.
    consensus_samples: int = _decoding(
        100,
        "captions to sample and compare the beam with (0: compare the beam "
        "with itself)",
        0,
        1000,
        sample=0,
    )
    min_caption_length: int = _decoding(1, "shortest caption, in tokens", 1)
    # Captions of ten words seldom repeat themselves; for small models that do,
    # 2 or 3 helps.
    no_repeat_ngram: int = _decoding(
        0, "never repeat an n-gram of this many tokens (0: allowed)", 0
    )
    split: str = _decoding(
        "test", "split that evaluate.py scores", choices=SPLITS
    )

    @property
    def input_size(self) -> int:
        """Side in pixels of the images that the encoder gets."""
        return self.image_size * self.magnification

    def __post_init__(self) -> None:
        for name, each in FIELDS.items():
            _check(each, getattr(self, name))
        check_name("dataset", self.dataset)
        if self.run_name:
            check_name("run_name", self.run_name)
        each_encoder(self)
        if self.min_caption_length > self.max_caption_length:
            raise UserError(
                f"min_caption_length {self.min_caption_length} is above "
                f"max_caption_length {self.max_caption_length}: lower the first"
            )
        if self.val_share + self.test_share >= 1:
            raise UserError(
                "val_share and test_share leave nothing to train on: lower them"
            )


FIELDS = {each.name: each for each in dataclasses.fields(Config)}


def _check(each: dataclasses.Field, value: Any) -> None:
    """Checks a value against the type and the limits of its field."""
    kind: Any = each.type
    if not isinstance(value, (int, float) if kind is float else kind):
        raise UserError(f"{each.name} {value!r} is not of type {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{each.name} {value} is not a finite number")
    least, most = each.metadata["least"], each.metadata["most"]
    if least is not None and not value >= least:
        raise UserError(f"{each.name} {value} is below {least}")
    if most is not None and not value <= most:
        raise UserError(f"{each.name} {value} is above {most}")
    choices: Sequence[str] = each.metadata["choices"]
    text = str(value)
    names = text.split("+") if each.metadata["joined"] else [text]
    wrong = [name for name in names if choices and name not in choices]
    if wrong:
        raise UserError(
            f"{each.name} {wrong[0]!r} is not one of {', '.join(choices)}"
            + did_you_mean(wrong[0], choices)
        )
    if len({*names}) < len(names):
        raise UserError(f"{each.name} {value!r} repeats a name")


def did_you_mean(word: str, valid: Collection[str]) -> str:
    """Ends an error with the valid word that is most like a wrong one."""
    close = difflib.get_close_matches(word, valid, 1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def each_encoder(config: Config) -> list[tuple[str, str]]:
    """The encoders that a config joins, and the weights of each.

    Returns:
        Pairs of a key of `ENCODERS` and `auto`, `imagenet`, `scenes`, `random`
        or the path of a weights file.

    Raises:
        UserError: if there are more or fewer weights than encoders.
    """
    names, weights = config.encoder.split("+"), [config.encoder_weights]
    if len(names) > 1:
        weights = config.encoder_weights.split(",")
    if len(weights) == 1:
        weights *= len(names)
    if len(weights) != len(names):
        raise UserError(
            f"encoder_weights {config.encoder_weights!r} lists {len(weights)} "
            f"for {len(names)} encoders: list one for each of "
            f"{config.encoder}, or give the --encoder that they belong to"
        )
    return [*zip(names, weights, strict=True)]


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def group(name: str) -> list[str]:
    """The names of the fields of a group, in order."""
    return [n for n, each in FIELDS.items() if each.metadata["group"] == name]


def check_name(field_name: str, name: str) -> str:
    """Checks that a dataset or a run has the name of a plain folder.

    Args:
        field_name: `dataset` or `run_name`.
        name: its value. Folders of this name are written to.

    Returns:
        The name.

    Raises:
        UserError: if it could lead out of its root, or not be created.
    """
    wrong = "" if _PLAIN.fullmatch(name) else "is not a plain folder name"
    if field_name == "dataset" and name.lower() == "cache":
        wrong = "would be the folder of the caches"
    if wrong:
        raise UserError(
            f"{field_name} {name!r} {wrong}: give {_INSTEAD[field_name]}"
        )
    return name


def resolve(config: Config, given: Collection[str] = ()) -> Config:
    """Settles every choice that a config leaves open.

    A saved config then means the same on another machine and under later
    defaults. Three stay open until more is known: `precision` depends on the
    machine, `epochs` on the number of training images, and `tokeniser` on
    their captions.

    Args:
        config: from defaults and flags.
        given: the fields that were given as flags.

    Raises:
        UserError: if a dataset cannot take its folder's name, or lies inside
            the cache folder.
    """
    place = Path(os.path.realpath(config.dataset_dir))
    caches = Path(os.path.realpath(Path(config.data_dir, "cache")))
    home = Path(os.path.realpath(Path(config.data_dir, SAMPLE)))
    if config.dataset_dir and caches in place.parents:
        raise UserError(
            f"the dataset in {place} lies inside the cache folder, {caches}: "
            "move it, or give another --data-dir"
        )
    if is_named_by_folder(config, given):
        config = dataclasses.replace(config, dataset=place.name)
    sample = config.dataset == SAMPLE
    if sample and config.dataset_dir and place != home:
        raise UserError(
            f"the dataset in {place} cannot have the name of the built-in "
            f"{SAMPLE}: give it another with --dataset"
        )
    if sample:
        own = {n: x.metadata["sample"] for n, x in FIELDS.items()}
        free = [n for n in own if own[n] is not None and n not in given]
        config = dataclasses.replace(config, **{n: own[n] for n in free})
    auto = "random" if sample else "imagenet"
    weights = [
        (SCENES if name == SCENES else auto) if each == "auto" else each
        for name, each in each_encoder(config)
    ]
    # One for all stays one for all.
    if "," not in config.encoder_weights and len({*weights}) == 1:
        weights = weights[:1]
    return dataclasses.replace(
        config,
        run_name=config.run_name or f"{config.dataset}-{config.encoder}",
        encoder_weights=",".join(weights),
    )


def defaults(dataset: str) -> Config:
    """The resolved config of a dataset for which nothing else is given."""
    return resolve(Config(dataset=dataset, dataset_dir=""))


def is_named_by_folder(config: Config, given: Collection[str]) -> bool:
    """Whether dataset_dir was given alone, so that its folder is the name."""
    if not config.dataset_dir or "dataset" in given:
        return False
    return "dataset_dir" in given or config.dataset == SAMPLE
