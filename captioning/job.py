"""Several processes, on several machines, that train one run together.

Each is `python train.py` with the same flags and, in its environment, where
the first process is, how many there are and which of them it is, in Keras's
own variables. JAX connects them: all of them do the same steps, each reads
its share of every batch, and the first one writes and speaks.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator

from config import UserError

ADDRESSES = "KERAS_DISTRIBUTION_JOB_ADDRESSES"
PROCESSES = "KERAS_DISTRIBUTION_NUM_PROCESSES"
PROCESS = "KERAS_DISTRIBUTION_PROCESS_ID"
# After so many seconds without a sign of life a process counts as lost, and
# with it the job.
SILENCE = 60
LOST = (
    "a process of the job has ended or cannot be reached: start all of "
    "them again, and they go on from the last saved state"
)

# What stands in JAX's errors when one is lost: by what it exchanges data on
# CPUs and GPUs, and what its service of coordination says.
NETWORK = ("Gloo", "NCCL", "DEADLINE_EXCEEDED", "UNAVAILABLE", "coordination")


def described() -> bool:
    """Whether the environment describes a job of several processes."""
    return bool(os.environ.get(ADDRESSES))


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Joins the job that the environment describes, if it does.

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
            f"{PROCESS} is {process}: of {processes} processes the last one "
            f"is {processes - 1}"
        )
    if os.name == "nt":
        raise UserError(
            f"a job of several processes needs Linux: unset {ADDRESSES}"
        )
    with _watched():
        import jax
        import keras

        if keras.backend.backend() != "jax":
            raise UserError(
                "several processes train together on JAX alone: set "
                f"KERAS_BACKEND=jax, or unset {ADDRESSES}"
            )
        try:
            # Not keras.distribution.initialize: it imports TensorFlow to
            # draw a seed that is set already, and cannot be given a timeout.
            jax.distributed.initialize(
                os.environ[ADDRESSES].split(",")[0],
                processes,
                process,
                heartbeat_timeout_seconds=SILENCE,
            )
            if process:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            yield process
            wait("end")  # who is done first would end the others
        except (RuntimeError, ValueError) as error:
            if not any(name in str(error) for name in NETWORK):
                raise
            raise UserError(LOST) from None


def _number(name: str, least: int) -> int:
    """A number from the environment."""
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < least:
        raise UserError(
            f"{name} is {text!r}: with {ADDRESSES} set it has to be a number, "
            f"at least {least}"
        )
    return int(text)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Says in one line that JAX has ended this process.

    When another process is lost, JAX ends all of them from a thread of its
    own, with a stack trace and past Python. What it writes is hidden, and a
    second process, that only waits for the end of this one, tells the user.
    """
    end, alive = os.pipe()
    if os.fork() == 0:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        os.close(alive)
        if not os.read(end, 1):
            script = os.path.basename(sys.argv[0])
            print(f"{script}: {LOST}", file=sys.stderr, flush=True)
        os._exit(0)
    os.close(end)
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.write(alive, b".")


def wait(name: str) -> None:
    """Waits until all processes have come here."""
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
