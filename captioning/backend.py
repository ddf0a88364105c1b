"""What differs between backends, processors and accelerators."""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras

from config import Config

TENSORFLOW = keras.backend.backend() == "tensorflow"
# The first generation of GPUs that multiplies bfloat16.
AMPERE = (8, 0)


class Devices(NamedTuple):
    """The devices that share each batch of training."""

    number: int = 1  # in all processes
    process: int = 0  # which of the processes this is
    processes: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.process == 0


ALONE = Devices()


@contextlib.contextmanager
def all_devices() -> Iterator[Devices]:
    """Trains what is built inside on every device that JAX has.

    Data parallelism: each device has all weights, and its share of every
    batch. The batch, and with it the result, stays what it is. TensorFlow
    trains on one device, and says so where there are more.
    """
    if TENSORFLOW:
        idle = len(accelerators()) - 1
        if idle > 0:
            print(
                f"TensorFlow trains on one GPU; {idle} more would be used with "
                "KERAS_BACKEND=jax.",
                file=sys.stderr,
            )
        yield ALONE
        return
    import jax

    devices = Devices(
        jax.device_count(), jax.process_index(), jax.process_count()
    )
    if devices == ALONE:
        yield devices
        return
    parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    with _distributed(parallel):
        yield devices


def one_device() -> contextlib.AbstractContextManager[None]:
    """Builds and runs what is inside on one device of this process."""
    return contextlib.nullcontext() if TENSORFLOW else _distributed(None)


@contextlib.contextmanager
def _distributed(distribution: Any) -> Iterator[None]:
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(distribution)
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)


def use_xla() -> bool:
    """Whether to compile with XLA.

    TensorFlow's own kernels are faster than XLA's on a CPU, and an unrolled
    loop takes XLA minutes to compile there.
    """
    return not TENSORFLOW or bool(accelerators())


def set_seed(seed: int) -> None:
    """Makes weights and dropout depend on a seed."""
    if TENSORFLOW:
        keras.utils.set_random_seed(seed)
    else:
        # What Keras draws its own seeds from. Its function would import
        # TensorFlow where that is installed.
        random.seed(seed)


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], state: Any, inputs: Any
) -> tuple[Any, Any]:
    """`keras.ops.scan` over the second axis, unrolled on TensorFlow.

    There a loop runs at half the speed of its unrolled steps, and the outputs
    of a step have to be shaped like its state.

    Args:
        step: takes the state and an input; returns the next state and the
            outputs of the step.
        state: the first state.
        inputs: (batch, steps, ...).

    Returns:
        The last state, and the outputs of all steps, (batch, steps, ...).
    """
    ops, tree = keras.ops, keras.tree
    if TENSORFLOW:
        outputs = []
        for each in ops.unstack(inputs, axis=1):
            state, found = step(state, each)
            outputs.append(found)
        return state, tree.map_structure(lambda *e: ops.stack(e, 1), *outputs)
    state, outputs = ops.scan(step, state, ops.moveaxis(inputs, 1, 0))
    return state, tree.map_structure(lambda e: ops.moveaxis(e, 0, 1), outputs)


def set_precision(config: Config) -> str:
    """Sets the arithmetic of all layers that are built from now on.

    Returns:
        The policy: `float32`, `mixed_bfloat16` or `mixed_float16`.
    """
    policy = config.precision
    if policy == "auto":
        bfloat16 = _multiplies_bfloat16()
        policy = "mixed_bfloat16" if bfloat16 else "float32"
    keras.config.set_dtype_policy(policy)
    return policy


def accelerators() -> list[Any]:
    """The GPUs (or TPUs) of this machine, as the backend names them."""
    if TENSORFLOW:
        import tensorflow as tf

        return tf.config.list_physical_devices("GPU")
    import jax

    return [each for each in jax.local_devices() if each.platform != "cpu"]


def _multiplies_bfloat16() -> bool:
    """Whether every device multiplies bfloat16 in hardware."""
    devices = accelerators()
    if not devices:
        return _cpu_multiplies_bfloat16()
    return all(_capability(each) >= AMPERE for each in devices)


def _capability(device: Any) -> tuple[int, ...]:
    """CUDA's compute capability of a device; all but a GPU have enough."""
    if TENSORFLOW:
        import tensorflow as tf

        details = tf.config.experimental.get_device_details(device)
        return details.get("compute_capability", AMPERE)
    text = getattr(device, "compute_capability", None)
    return tuple(map(int, text.split("."))) if text else AMPERE


def _cpu_multiplies_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
