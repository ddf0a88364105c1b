"""Captions -> splits and vocabulary; images -> feature cache.

    python preprocess.py
    python preprocess.py --dataset flickr30k

Reads the dataset in data/<dataset>/ (the default one, `sample`, is drawn on
the spot), runs every image once through the frozen encoder, and leaves the
result in data/cache/<dataset>/. Killed half-way, it goes on where it stopped.
"""

from pathlib import Path
from typing import Any

from captioning import command
from config import SPLITS, Config, UserError


def main(arguments: command.Arguments) -> None:
    """Preprocesses a dataset."""
    from captioning import datasets, prepared
    from captioning.files import lock

    config = arguments.config
    directory = dataset_directory(config)
    dataset = datasets.find_dataset(
        directory, config.layout, config.val_share, config.test_share
    )
    print(dataset.summary)
    check_skipped(config, dataset)
    dataset = limit(config, dataset)
    check_splits(config, dataset)
    place = prepared.folder(config)
    with lock(place):
        skipped, repaired = encode_images(config, dataset)
        skipped = dataset.skipped + skipped
        dataset = dataset._replace(
            skipped=skipped,
            repaired=dataset.repaired + repaired,
            table=without(dataset.table, [image for image, _ in skipped]),
        )
        check_skipped(config, dataset)
        check_splits(config, dataset)
        words = prepared.save(config, dataset)
    report(dataset, len(words), place)
    print(f"Wrote {place}. Next: {command.next_line('train.py', arguments)}")


def dataset_directory(config: Config) -> Path:
    """Where the dataset is; draws the sample there if that is wanted."""
    if config.dataset_dir:
        return Path(config.dataset_dir)
    directory = Path(config.data_dir) / config.dataset
    if config.dataset == "sample":
        from captioning.sample import write_sample

        write_sample(directory)
    return directory


def without(table: Any, images: list[str]) -> Any:
    """The rows of a table but for those of some images."""
    return table[~table["image"].isin(images)].reset_index(drop=True)


def limit(config: Config, dataset: Any) -> Any:
    """Keeps the first `limit_images` images of each split."""
    if not config.limit_images:
        return dataset
    table = dataset.table
    first = table.drop_duplicates("image").groupby("split", sort=False)
    kept = first.head(config.limit_images)["image"]
    table = table[table["image"].isin(kept)].reset_index(drop=True)
    return dataset._replace(table=table)


def check_splits(config: Config, dataset: Any) -> None:
    """Training needs a train and a val split."""
    there = set(dataset.table["split"])
    for split in ("train", "val"):
        if split not in there:
            raise UserError(
                f"the dataset {config.dataset} has no usable image in the "
                f"split {split}: see data/README.md for how splits are made"
            )


def check_skipped(config: Config, dataset: Any) -> None:
    """Stops where too many images are unusable."""
    there = set(dataset.table["image"])
    lost = {image for image, _ in dataset.skipped} - there
    share = len(lost) / max(len(lost) + len(there), 1)
    if share > config.max_skipped_share:
        image, reason = next(p for p in dataset.skipped if p[0] in lost)
        raise UserError(
            f"{len(lost):,} of {len(lost) + len(there):,} images are "
            f"unusable, the first of them {image} ({reason}): mend the "
            "dataset, or allow more with --max-skipped-share"
        )


def encode_images(config: Config, dataset: Any) -> Any:
    """Fills the feature cache; returns what was skipped and repaired."""
    command.import_keras()
    import cv2
    import keras

    import model
    from captioning import backend, extraction, features, prepared

    weights = model.encoder_weights(config)
    description = model.describe_features(config, weights)
    precision = backend.set_precision(config)
    names = list(dataset.table["image"].unique())
    cache = features.create(
        prepared.folder(config) / features.key(description),
        description,
        {
            "keras": keras.version(),
            "backend": keras.backend.backend(),
            "opencv": cv2.__version__,
            "precision": precision,
        },
        names,
        model.feature_shape(config),
    )

    def build() -> Any:
        print(
            f"Encoding with {config.encoder} ({weights} weights, {precision})"
        )
        return model.build_encoder(config, weights).predict_on_batch

    return extraction.fill(
        cache, dataset.images_dir, names, config.image_size, build
    )


def report(dataset: Any, words: int, place: Path) -> None:
    """Says what was made."""
    images = dataset.table.drop_duplicates("image")["split"].value_counts()
    captions = dataset.table["split"].value_counts()
    for split in SPLITS:
        if split in images:
            print(
                f"  {split:<6}{images[split]:>8,} images"
                f"{captions[split]:>10,} captions"
            )
    print(
        f"  vocabulary of {words:,} words; {len(dataset.skipped):,} entries "
        f"skipped, {len(dataset.repaired):,} repaired (skipped.csv, "
        "repaired.csv)"
    )


if __name__ == "__main__":
    command.run(main, __doc__)
