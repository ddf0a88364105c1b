"""What differs between backends, processors and accelerators."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
from keras import ops

from config import Config

TENSORFLOW = keras.backend.backend() == "tensorflow"
# TensorFlow takes batches of any length, so that captions are packed without
# padding. JAX compiles anew for each length and gets padded batches.
PACKED = TENSORFLOW


def use_xla() -> bool:
    """Whether to compile with XLA.

    TensorFlow's own kernels are faster than XLA's on a CPU, and an unrolled
    loop takes XLA minutes to compile there.
    """
    return not TENSORFLOW or _has_gpu()


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
) -> Any:
    """Runs a step over the first axis of its inputs.

    JAX compiles a loop in a fifth of the time that the same steps take one
    after the other. TensorFlow's loop is the slower one, and Keras lets no
    step of it give anything that is not shaped like the state.

    Args:
        step: takes the state and an input; gives the next state and what is
            wanted of the step.
        state: the first state.
        inputs: (steps, ...).

    Returns:
        What was wanted of each step, (steps, ...).
    """
    if not TENSORFLOW:
        return ops.scan(step, state, inputs)[1]
    wanted = []
    for number in range(inputs.shape[0]):
        state, each = step(state, inputs[number])
        wanted.append(each)
    return keras.tree.map_structure(lambda *each: ops.stack(each), *wanted)


def set_precision(config: Config) -> str:
    """Sets the arithmetic of all layers that are built from now on.

    Returns:
        The policy: `float32`, `mixed_bfloat16` or `mixed_float16`.
    """
    policy = config.precision
    if policy == "auto":
        bfloat16 = _has_gpu() or _cpu_multiplies_bfloat16()
        policy = "mixed_bfloat16" if bfloat16 else "float32"
    keras.config.set_dtype_policy(policy)
    return policy


def _has_gpu() -> bool:
    return bool(keras.distribution.list_devices("gpu"))


def _cpu_multiplies_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
