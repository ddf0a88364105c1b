"""checkpoints/<run>/ -> captions, metrics, report.

    python evaluate.py
    python evaluate.py --dataset flickr8k --split val
    python evaluate.py --captions captions.json
    python evaluate.py --runs first second
    python evaluate.py --compare before after
    python evaluate.py --export program

Captions a split with beam search, scores the captions and writes everything to
checkpoints/<run>/evaluation/<split>/. A different search or fewer images get
their own folder: evaluation/<split>-beam5-limit100/. --captions scores a
file of captions (COCO's results format) instead. --runs averages the
probabilities of several runs at every word; their joint results are in
checkpoints/<run>+<run>/. --compare says whether one evaluation is better than
another by more than chance, and shows the images where they differ most.
--export scores nothing: it writes the run as one program, from pixels to words.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

from captioning import command
from config import Config, UserError, check_name

ACTIONS: command.Actions = {
    "--captions": {
        "metavar": "FILE",
        "help": "score the captions in this file instead of making some",
    },
    "--runs": {
        "nargs": "+",
        "type": functools.partial(check_name, "run_name"),
        "metavar": "RUN",
        "help": "average the probabilities of these runs, which must have "
        "the same vocabulary",
    },
    "--compare": {
        "nargs": 2,
        "metavar": ("A", "B"),
        "help": "compare two evaluations: names of runs, or folders below "
        "evaluation/",
    },
    "--export": {
        "metavar": "DIR",
        "help": "write encoder, decoder and search there as one "
        "TensorFlow SavedModel",
    },
}
SHOWN = 5  # captions printed


def main(arguments: command.Arguments) -> None:
    """Evaluates a run on a split."""
    from captioning import run_configs, runs
    from captioning.data import prepared
    from captioning.files import lock, write_json
    from captioning.scoring import metrics, results, table

    given, actions = arguments.given, arguments.actions
    if actions.compare:
        compare_evaluations(arguments.config, *actions.compare)
        return
    members = run_configs.members(arguments.config, given, actions.runs)
    if actions.export:
        export_run(members, Path(actions.export))
        return
    if not actions.captions:
        command.import_keras()
        from captioning.scoring import evaluation

        members = evaluation.in_one_precision(members)
    config, run = members[0][0], run_configs.together(members)
    split = prepared.load_split(config, config.split)
    if actions.captions:
        captions = results.read_captions(Path(actions.captions), split)
    limited = given.get("limit_images", 0)
    if limited >= len(split.images):
        limited = 0  # that is all of the split
    split = split.first(limited)
    trained = runs.load_config(members[0][1])
    name = results.folder_name(config, trained, limited, actions.captions)
    place = run / "evaluation" / name
    with lock(place), results.replaced(place) as part:
        figures: dict[str, Any] = {}
        counts = None
        captioned: dict[str, Any] = {}
        if not actions.captions:
            captioned, figures, counts = evaluation.caption_split(
                members, split
            )
            captions = {image: x.caption for image, x in captioned.items()}
        # Before anything is scored: hours of work are on disk first.
        results.write_captions(part / "captions.json", split, captions)
        references = dict(zip(split.images, split.captions, strict=True))
        training = None
        if actions.captions or trained.dataset == config.dataset:
            known = prepared.load_split(config, "train").captions
            training = itertools.chain.from_iterable(known)
        scores = metrics.score(captions, references, training, config.tokeniser)
        origin = results.describe_run(
            members, split.images, own=not actions.captions
        )
        figures = results.all_metrics(config, origin, figures, scores)
        write_json(part / "metrics.json", figures, ensure_ascii=False)
        examples = results.write_examples(
            part / "captions.csv", captions, references, scores, counts
        )
        if captioned:
            results.write_report(
                part,
                f"{run.name} on {name}",
                config,
                figures,
                examples,
                captioned,
                prepared.images_dir(config),
                run / "history.csv",
            )
    for line in scores.notices:
        print(line)
    print(table.table(figures, config.dataset))
    show(examples)
    look = " (open report.html)" if captioned else ""
    next_line = command.next_line("caption.py", arguments)
    if actions.runs:  # of which caption.py takes one
        next_line += f" --run-name {members[0][1].name}"
    print(f"Wrote {place}{look}. Next: {next_line} PHOTO_OR_FOLDER...")


def compare_evaluations(config: Config, *names: str) -> None:
    """Compares two evaluations, and writes a page about them."""
    from captioning.data import prepared
    from captioning.scoring import compare

    first, second = compare.pair(
        *(compare.load(x, config.checkpoints_dir, config.split) for x in names)
    )
    differences = compare.compare(first, second)
    print(compare.as_text(first, second, differences))
    dataset = second.metrics["run"]["dataset"]
    photographs = prepared.newest_images_dir(config.data_dir, dataset)
    if photographs is None:
        print(
            f"The photographs of {dataset} were not found, so the page shows "
            "only captions: run preprocess.py again, or give --data-dir."
        )
    page = compare.write_page(first, second, differences, photographs)
    print(f"Wrote {page}. Next: open it to see where they differ most.")


def export_run(members: list[tuple[Config, Path]], folder: Path) -> None:
    """Writes a run as one program."""
    if len(members) > 1:
        raise UserError("--export takes one run: give --run-name, not --runs")
    command.import_keras()
    from captioning.decoding import captioner, export

    config, run = members[0]
    encoder, searcher, words = captioner.load(config, run)
    export.save(encoder, searcher, words, config.input_size, folder)
    print(
        f"Wrote {folder}: uint8 RGB images (batch, {config.input_size}, "
        f"{config.input_size}, 3) -> word_ids, words, scores. "
        f"Next: program = tf.saved_model.load({str(folder)!r}); "
        "program.serve(images)"
    )


def show(examples: Any) -> None:
    """Prints some captions, from the best to the worst, with a reference."""
    ordered = examples.sort_values("cider", ascending=False)
    # The one in the middle of each fifth.
    places = {(2 * n + 1) * len(ordered) // (2 * SHOWN) for n in range(SHOWN)}
    print("From the best to the worst by CIDEr:")
    for row in ordered.iloc[sorted(places)].itertuples():
        print(f"  {row.image}: {row.caption}")
        print(f"      a reference: {row.references[0]}")


if __name__ == "__main__":
    command.run(main, __doc__, ACTIONS)
