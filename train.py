"""Feature cache -> checkpoints/<run>/.

    python train.py
    python train.py --dataset flickr30k --epochs 15
    python train.py --dataset holidays --start-from RUN

Trains the decoder on what preprocess.py wrote to data/cache/. Give the same
command again to resume a run that was stopped in any way; --fresh starts over
and renames the old folder.
--start-from begins with the weights of another run; a lower --learning-rate
keeps more of them.
"""

import functools
from contextlib import nullcontext

from captioning import command, job
from config import UserError, check_name

ACTIONS: command.Actions = {
    "--fresh": {
        "action": "store_true",
        "help": "start over; the old run folder is renamed",
    },
    "--start-from": {
        "type": functools.partial(check_name, "run_name"),
        "metavar": "RUN",
        "help": "begin with the weights of another run with the same "
        "encoder, such as 'pretrained'",
    },
    "--tensorboard": {
        "action": "store_true",
        "help": "log for TensorBoard on JAX too; needs TensorFlow",
    },
}


def main(arguments: command.Arguments) -> None:
    """Trains a run, or resumes it."""
    from captioning import run_configs, runs
    from captioning.data import prepared
    from captioning.files import lock

    place, actions = runs.folder(arguments.config), arguments.actions
    start = place.with_name(actions.start_from) if actions.start_from else None
    if start == place:
        raise UserError(
            f"{place} cannot start from itself: give another --run-name"
        )
    with job.joined() as process, nullcontext() if process else lock(place):
        fresh = actions.fresh and place.exists()
        config = arguments.config
        if not fresh:
            config = run_configs.training_config(config, arguments.given, place)
        config = prepared.settle_tokeniser(config)
        captions = prepared.load_captions(config)
        command.import_keras()
        from captioning import backend
        from captioning.training.fit import fit

        with backend.all_devices() as devices:
            fit(
                config,
                place,
                captions,
                devices,
                start,
                fresh=fresh,
                tensorboard=actions.tensorboard,
            )
    following = command.next_line("evaluate.py", arguments)
    if "test" not in prepared.splits(config):
        following += " --split val"
    print(f"Wrote {place}. Next: {following}")


if __name__ == "__main__":
    command.run(main, __doc__, ACTIONS)
