"""Several processes, on several machines, that train one run together.

Each is `python train.py` with the same flags. Keras's own environment
variables tell it where the first process is, how many there are, and which one
it is. JAX connects them: all take the same steps, each reads its share of every
batch, and the first one writes and prints.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator

from config import UserError

ADDRESSES = "KERAS_DISTRIBUTION_JOB_ADDRESSES"
PROCESSES = "KERAS_DISTRIBUTION_NUM_PROCESSES"
PROCESS = "KERAS_DISTRIBUTION_PROCESS_ID"
# After this many seconds without a sign of life a process counts as lost.
SILENCE = 60
LOST = (
    "a process of the job has ended or cannot be reached: start all of them "
    "again, and they resume from the last saved state"
)

# What JAX's errors mention when one is lost: its transports on CPUs and GPUs,
# and its coordination service.
NETWORK = ("Gloo", "NCCL", "DEADLINE_EXCEEDED", "UNAVAILABLE", "coordination")


def described() -> bool:
    """Whether the environment describes a job of several processes."""
    return bool(os.environ.get(ADDRESSES))


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Joins the job that the environment describes, if it does.

    When a process is lost, the others end too: by the error below if it breaks
    one of their steps, and otherwise by JAX itself, which ends them with a
    message of its own.

    Yields:
        The number of this process; 0 if it is alone.

    Raises:
        UserError: if the job is described wrongly, or has lost a process.
    """
    if not described():
        yield 0
        return
    processes, process = _number(PROCESSES, 1), _number(PROCESS, 0)
    if process >= processes:
        raise UserError(
            f"{PROCESS} is {process}: with {processes} processes, the last is "
            f"number {processes - 1}"
        )
    if os.name == "nt":
        raise UserError(
            f"a job of several processes needs Linux: unset {ADDRESSES}"
        )
    if os.environ.get("KERAS_BACKEND") != "jax":
        raise UserError(
            "several processes train together on JAX only: set "
            f"KERAS_BACKEND=jax, or unset {ADDRESSES}"
        )
    try:
        import jax
    except ImportError:
        raise UserError("JAX is not installed: pip install jax") from None
    try:
        # Not keras.distribution.initialize: it imports TensorFlow to draw a
        # seed that is set already, and takes no timeout.
        jax.distributed.initialize(
            os.environ[ADDRESSES].split(",")[0],
            processes,
            process,
            heartbeat_timeout_seconds=SILENCE,
        )
        if process:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        yield process
        wait("end")  # the first to finish would end the others
    except (RuntimeError, ValueError) as error:
        if not any(name in str(error) for name in NETWORK):
            raise
        raise UserError(LOST) from None


def _number(name: str, least: int) -> int:
    """Reads a number from the environment."""
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < least:
        raise UserError(
            f"{name} is {text!r}: where {ADDRESSES} is set, it has to be a "
            f"number, at least {least}"
        )
    return int(text)


def wait(name: str) -> None:
    """Waits until all processes have arrived here."""
    if described():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def gather(texts: list[str]) -> list[list[str]]:
    """Gives every process of a job the texts that each of them has."""
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    most = multihost_utils.process_allgather(np.array([len(data)])).max()
    padded = np.pad(data, (0, most - len(data)))
    found = multihost_utils.process_allgather(padded)  # (processes, most)
    return [json.loads(bytes(each).rstrip(b"\0")) for each in found]
