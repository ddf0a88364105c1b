"""Every hyperparameter, in one frozen dataclass.

Change a default here, or give any field as a flag to any of the scripts:
`python train.py --batch-images 32 --seed 1`.

What the defaults give: on Flickr8k's validation split, with the flags that
README.md names, CIDEr 0.577, BLEU-4 22.5 and 41.9% token accuracy (2026-11-27).
On two CPU cores with bfloat16 that is about ten minutes of preprocess.py, a
quarter of an hour of train.py, and a minute of evaluate.py. Training takes 2 GB
of memory for itself, and reads 1.4 GB of features that the system best keeps
there too. docs/experiments.md has what was tried and what each change brought.

The group of a field says what a change of it means:

    place     where things are and what is tolerated: results do not change
    data      which captions and which words: another folder in data/cache/
    encoder   which image features: another feature folder below it (more
              views: more rows in the same one)
    model     the shape of the decoder: fixed by the run once it is trained
    training  how it is trained: fixed by the run, but for epochs and patience
    decoding  how captions are searched for and scored: free at any time
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class UserError(Exception):
    """Something the user can put right, told in one line.

    The message says what is wrong, where, and what to do next. Every script
    prints it on standard error and exits with code 1.
    """


class Encoder(NamedTuple):
    """One line of the table of encoders."""

    application: str  # class in keras.applications
    module: str  # module in keras.applications with its preprocess_input
    layer: str  # the layer whose output is cached as annotation vectors


# The name that --encoder takes -> where Keras Applications has it. A new
# encoder is one line here. VGG's block5_conv3 is the layer that Show, Attend
# and Tell uses (Xu et al. 2015, section 4.3); of the residual networks it is
# the last convolutional layer.
ENCODERS = {
    "vgg16": Encoder("VGG16", "vgg16", "block5_conv3"),
    "vgg19": Encoder("VGG19", "vgg19", "block5_conv4"),
    "resnet50": Encoder("ResNet50", "resnet50", "conv5_block3_out"),
    "resnet101": Encoder("ResNet101", "resnet", "conv5_block3_out"),
    "resnet152": Encoder("ResNet152", "resnet", "conv5_block3_out"),
    "mobilenetv2": Encoder("MobileNetV2", "mobilenet_v2", "out_relu"),
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
)
PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")
SPLITS = ("train", "val", "test")
SPLIT_SYNONYMS = {"dev": "val", "validation": "val", "valid": "val"}


def _setting(group: str, default: Any, text: str, **limits: Any) -> Any:
    """A field.

    Args:
        group: what a change of it means.
        default: its value where nothing else is said.
        text: for --help.
        limits: `least` and `most` for numbers, `choices` for names.
    """
    metadata = {"group": group, "help": text, **limits}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """The hyperparameters of one run.

    Raises:
        UserError: if a value is outside the limits of its field.
    """

    # --- place ---------------------------------------------------------
    # Roots of what is read and written; both are ignored by git.
    data_dir: str = _setting("place", "data", "root of the datasets and caches")
    checkpoints_dir: str = _setting(
        "place", "checkpoints", "root of the run folders"
    )
    # Empty: data/<dataset>. For a dataset that lies somewhere else.
    dataset_dir: str = _setting(
        "place", "", "where the dataset is, if not data/<dataset>"
    )
    # Empty: <dataset>-<encoder>, so that two encoders do not share a run.
    run_name: str = _setting(
        "place", "", "folder in checkpoints/ (empty: <dataset>-<encoder>)"
    )
    # One broken photograph in twenty is an accident; more is a wrong folder
    # or a download that stopped half-way, and no reason to train on the rest.
    max_skipped_share: float = _setting(
        "place",
        0.05,
        "stop if a larger share of the images is unusable",
        least=0,
        most=1,
    )

    # --- data ----------------------------------------------------------
    # The sample is drawn on the spot, so that everything runs without a
    # download; any other name is a folder in data/.
    dataset: str = _setting(
        "data", "sample", "'sample', or the name of a folder in data/"
    )
    # A folder may hold the same captions in two layouts; see data/README.md.
    layout: str = _setting(
        "data", "auto", "how the captions are laid out", choices=LAYOUTS
    )
    # For a quick try; it has a cache folder of its own.
    limit_images: int = _setting(
        "data", 0, "use only the first N images of each split (0: all)", least=0
    )
    # Words seen fewer times cannot be learned from 30,000 captions and cost
    # time in the output layer; 4 keeps 97% of Flickr8k's words.
    min_word_count: int = _setting(
        "data", 4, "a word needs so many occurrences in train", least=1
    )
    # 98% of Flickr8k's captions are shorter, and the decoder's loop costs as
    # many steps as the longest caption has words.
    max_caption_length: int = _setting(
        "data", 20, "longer captions are cut here, in words", least=1, most=100
    )
    # Only for datasets without a split of their own: about 1,600 images each
    # of Flickr30k, enough to tell two models apart.
    val_share: float = _setting(
        "data",
        0.05,
        "share of val where the dataset has no split",
        least=0,
        most=1,
    )
    test_share: float = _setting(
        "data",
        0.05,
        "share of test where the dataset has no split",
        least=0,
        most=1,
    )

    # --- encoder -------------------------------------------------------
    # ResNet50 runs three times as fast as VGG16 and is cached in half the
    # bytes (49x2048 instead of 196x512 float16 numbers an image).
    encoder: str = _setting(
        "encoder",
        "resnet50",
        "the frozen image encoder",
        choices=tuple(ENCODERS),
    )
    # The drawn sample needs no trained filters; photographs do.
    encoder_weights: str = _setting(
        "encoder",
        "auto",
        "'imagenet', 'random' or a weights file ('auto': random for the "
        "sample, imagenet elsewhere)",
    )
    # What the encoders were trained at.
    image_size: int = _setting(
        "encoder",
        224,
        "side in pixels, before magnification; images are resized to it whole",
        least=32,
        most=2048,
    )

    # The encoder sees more in a photograph that is enlarged. Its regions are
    # averaged back to those of image_size, so that nothing after it is slower.
    magnification: int = _setting(
        "encoder",
        0,
        "how many times image_size the encoder gets images in (0: 2, and 1 "
        "for the sample)",
        least=0,
        most=8,
    )
    # Mirrored views are rows more of the same feature folder. Captions that
    # name a side are never shown with one.
    feature_views: int = _setting(
        "encoder",
        1,
        "views of an image to cache and train on (2: mirrored as well)",
        least=1,
        most=2,
    )

    # --- model ---------------------------------------------------------
    # 512 is what the yardsticks of the field use; the word embeddings are as
    # wide, so that the deep output adds the three without a projection more.
    embedding_units: int = _setting(
        "model", 512, "width of a word embedding", least=1
    )
    attention_units: int = _setting(
        "model", 512, "width of the attention's keys and queries", least=1
    )
    decoder_units: int = _setting(
        "model", 512, "width of the LSTM and of the annotation vectors", least=1
    )

    # --- training ------------------------------------------------------
    # On Flickr8k the validation loss is lowest after seven epochs of a
    # schedule of twelve; eight lets the learning rate fall in time.
    epochs: int = _setting(
        "training", 8, "passes over the training captions", least=1
    )
    # Counted in measurements of CIDEr, not in epochs.
    patience: int = _setting(
        "training",
        4,
        "stop after so many CIDEr measurements without a better one",
        least=1,
    )
    # Every image brings all of its captions, so that its keys are computed
    # once: 32 images are 160 captions a step.
    batch_images: int = _setting(
        "training",
        0,
        "images a training step (0: 32, and 16 for the sample)",
        least=0,
    )
    captions_per_image: int = _setting(
        "training",
        5,
        "captions of each image a step; the rest wait for the next epoch",
        least=1,
    )
    # Higher ones raise the token accuracy a little further, and lower the
    # scores of the captions: docs/experiments.md.
    learning_rate: float = _setting(
        "training", 1e-3, "highest learning rate, after the warm-up", least=0
    )
    # A word's embedding begins near zero, and most words are too rare to move
    # it far at the rate of the other weights. Token accuracy gains 0.6% by it,
    # and captions lose nothing: docs/experiments.md.
    embedding_rate: float = _setting(
        "training",
        16.0,
        "times learning_rate: the learning rate of the word embeddings",
        least=0,
    )
    # Adam's second moments need some hundred steps before they are worth
    # following at full speed.
    warmup_share: float = _setting(
        "training", 0.05, "share of the steps that warm up", least=0, most=1
    )
    weight_decay: float = _setting(
        "training", 0.01, "AdamW's decoupled weight decay", least=0
    )
    clip_norm: float = _setting(
        "training", 5.0, "global norm that gradients are clipped to", least=0
    )
    # Captions differ from each other: one-hot targets are too sure.
    label_smoothing: float = _setting(
        "training",
        0.1,
        "share of the target spread over all words",
        least=0,
        most=1,
    )
    # Xu et al. 2015, equation 14: each region's attention should sum to about
    # as much as any other's over the caption.
    attention_regularisation: float = _setting(
        "training",
        1.0,
        "weight of the doubly stochastic attention penalty",
        least=0,
    )
    # With less, Flickr8k's 30,000 captions are learned by heart.
    word_dropout: float = _setting(
        "training",
        0.4,
        "dropout on the word embeddings and annotation vectors",
        least=0,
        most=0.95,
    )
    output_dropout: float = _setting(
        "training", 0.5, "dropout before the output layer", least=0, most=0.95
    )
    # The average of the weights over the last steps captions better than the
    # last weights do; counted in epochs so that it suits any dataset.
    ema_epochs: float = _setting(
        "training",
        1.0,
        "epochs that the weights are averaged over (0: none)",
        least=0,
        most=100,
    )
    # Captioning the validation split takes about as long as a tenth of an
    # epoch of Flickr8k.
    cider_every: int = _setting(
        "training", 2, "epochs between measurements of CIDEr", least=1
    )
    # After cross-entropy, from its best epoch on: captions that are drawn and
    # rewarded (Rennie et al. 2017). None by default: Flickr8k's validation
    # images gained nothing from it, see docs/experiments.md.
    scst_epochs: int = _setting(
        "training",
        0,
        "epochs of self-critical training after those of cross-entropy",
        least=0,
    )
    # Rewards are noisy: small steps.
    scst_learning_rate: float = _setting(
        "training",
        5e-5,
        "learning rate of self-critical training",
        least=0,
    )
    seed: int = _setting(
        "training",
        0,
        "of weights, dropout and data order",
        least=0,
        most=2**32 - 1,
    )
    # auto: bfloat16 where the processor multiplies it in hardware.
    precision: str = _setting(
        "training",
        "auto",
        "arithmetic of encoder and decoder",
        choices=PRECISIONS,
    )

    # --- decoding ------------------------------------------------------
    # Twenty give the consensus below something to choose from; a caption that
    # is taken for its probability alone gets worse with more than five.
    beam_size: int = _setting(
        "decoding",
        20,
        "hypotheses kept at each step (1: greedy)",
        least=1,
        most=100,
    )
    # GNMT's length penalty (Wu et al. 2016, equation 14). At 1 captions are as
    # long as a greedy search writes them; at 0.7 a beam's are half a word
    # shorter and score less.
    length_exponent: float = _setting(
        "decoding", 1.0, "exponent of the length normalisation", least=0, most=5
    )
    # The likeliest caption is rarely the one that scores best: that is the one
    # most like the others of its beam. See captioning/decoding/consensus.py.
    consensus_temperature: float = _setting(
        "decoding",
        5.0,
        "the beam's captions choose the one most like them, and count by "
        "probability ^ (1 / temperature) (0: the likeliest is taken)",
        least=0,
    )
    min_caption_length: int = _setting(
        "decoding", 1, "the shortest caption, in words", least=1
    )
    # Captions of ten words seldom repeat themselves; small models that do are
    # helped by 2 or 3.
    no_repeat_ngram: int = _setting(
        "decoding",
        0,
        "so many words in a row do not come twice in a caption (0: they may)",
        least=0,
    )
    split: str = _setting(
        "decoding", "test", "what evaluate.py scores", choices=SPLITS
    )

    @property
    def step_images(self) -> int:
        """How many images a training step has."""
        # A thousand drawn scenes want more and smaller steps.
        return self.batch_images or (16 if self.dataset == "sample" else 32)

    @property
    def enlarged(self) -> int:
        """How many times image_size the encoder gets images in."""
        # Drawn shapes are large as they are, and the sample is to be quick.
        return self.magnification or (1 if self.dataset == "sample" else 2)

    @property
    def input_size(self) -> int:
        """Side in pixels of the images that the encoder gets."""
        return self.image_size * self.enlarged

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            _check(each, getattr(self, each.name))
        if self.min_caption_length > self.max_caption_length:
            raise UserError(
                f"min_caption_length {self.min_caption_length} is above "
                f"max_caption_length {self.max_caption_length}: lower the first"
            )
        if self.val_share + self.test_share >= 1:
            raise UserError(
                "val_share and test_share leave nothing to train on: lower them"
            )


def _check(each: dataclasses.Field, value: Any) -> None:
    """Holds a value against the kind and the limits of its field."""
    if not isinstance(value, (int, float) if each.type is float else each.type):
        raise UserError(f"{each.name} {value!r} is no {each.type.__name__}")
    least, most = each.metadata.get("least"), each.metadata.get("most")
    if least is not None and not value >= least:
        raise UserError(f"{each.name} {value} is below {least}")
    if most is not None and not value <= most:
        raise UserError(f"{each.name} {value} is above {most}")
    choices = each.metadata.get("choices")
    if choices and value not in choices:
        raise UserError(
            f"{each.name} {value!r} is none of {', '.join(choices)}"
        )


def group(name: str) -> list[str]:
    """The names of the fields of a group, in order."""
    return [
        each.name
        for each in dataclasses.fields(Config)
        if each.metadata["group"] == name
    ]
