"""What differs between backends, processors and accelerators."""

import contextlib
import random
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


ALONE = Devices()


@contextlib.contextmanager
def all_devices() -> Iterator[Devices]:
    """Has what is built and trained inside use every device there is.

    Data parallelism: each device has all weights, and its part of every
    batch. The batch, and with it the result, stays what it is.
    """
    if TENSORFLOW:
        import tensorflow as tf

        kind = "GPU" if accelerators() else "CPU"
        names = [each.name for each in tf.config.list_logical_devices(kind)]
        devices = Devices(len(names))
    else:
        import jax

        devices = Devices(
            jax.device_count(), jax.process_index(), jax.process_count()
        )
    if devices == ALONE:
        yield devices
    elif TENSORFLOW:
        with _distributed(tf.distribute.MirroredStrategy(names)):
            yield devices
    else:
        parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
        with _distributed(parallel):
            yield devices


def one_device() -> contextlib.AbstractContextManager[None]:
    """Has what is built and run inside be this process's own."""
    return _distributed(None)


@contextlib.contextmanager
def _distributed(way: Any) -> Iterator[None]:
    """Has what is inside be distributed in one way; None is not at all."""
    if TENSORFLOW:
        import tensorflow as tf

        strategy = tf.distribute.get_strategy()
        before = strategy if tf.distribute.has_strategy() else None
        change = tf.distribute.experimental_set_strategy
    else:
        before = keras.distribution.distribution()
        change = keras.distribution.set_distribution
    change(way)
    try:
        yield
    finally:
        change(before)


def over_devices(amounts: Any) -> Any:
    """Sums what each device has of a batch, within a step of training.

    On JAX a step sees the whole batch, whatever devices it lies on.

    Args:
        amounts: tensors in any structure.
    """
    if TENSORFLOW:
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if tf.distribute.has_strategy() and context:
            return context.all_reduce(tf.distribute.ReduceOp.SUM, amounts)
    return amounts


def use_xla() -> bool:
    """Whether to compile with XLA, which does so anew for each length of batch.

    TensorFlow's own kernels are faster than XLA's on a CPU, and an unrolled
    loop takes XLA minutes to compile there. It compiles for one device.
    """
    if not TENSORFLOW:
        return True
    import tensorflow as tf

    return bool(accelerators()) and not tf.distribute.has_strategy()


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
        return keras.ops.scan(step, state, inputs)[1]
    wanted = []
    for number in range(inputs.shape[0]):
        state, each = step(state, inputs[number])
        wanted.append(each)
    stack = keras.ops.stack
    return keras.tree.map_structure(lambda *each: stack(each), *wanted)


def split_steps(rows: Any, counts: Any, number: int) -> list[Any]:
    """Splits what is packed, on TensorFlow, where captions are packed.

    Args:
        rows: (tokens, ...), packed as `captioning.training.batches.pack` does.
        counts: tokens of each step, int32 (steps,).
        number: of steps.

    Returns:
        For each step (its tokens, ...).
    """
    import tensorflow as tf

    return tf.split(rows, counts, num=number)


def largest(scores: Any) -> Any:
    """Which of the scores is the largest, the first of equal ones.

    Keras looks for zeros of either sign first, which takes five times as long
    on TensorFlow.

    Args:
        scores: (..., words).

    Returns:
        int32 (...).
    """
    if not TENSORFLOW:
        return keras.ops.cast(keras.ops.argmax(scores, -1), "int32")
    import tensorflow as tf

    # In bfloat16 it takes twice as long.
    return tf.argmax(tf.cast(scores, "float32"), -1, output_type="int32")


def clip_by_global_norm(gradients: list[Any], norm: float) -> list[Any]:
    """Scales TensorFlow's gradients down to a norm of all of them together."""
    import tensorflow as tf

    # That of an embedding comes as rows, and the same row more than once.
    dense = [tf.convert_to_tensor(each) for each in gradients]
    found = tf.linalg.global_norm(dense)
    # Most are small enough, and need not be multiplied by 1.
    return tf.cond(
        found > norm,
        lambda: tf.clip_by_global_norm(dense, norm, found)[0],
        lambda: dense,
    )


def adamw_step(
    optimizer: Any,
    variable: Any,
    moments: Any,
    average: Any,
    gradient: Any,
    rates: tuple[Any, Any],
) -> None:
    """AdamW's step of one TensorFlow variable, in few passes over it.

    Args:
        optimizer: Keras's AdamW.
        variable: the weights.
        moments: the optimizer's first and second moments of their gradients.
        average: the moving average of the weights, or None.
        gradient: of the weights.
        rates: the learning rate, and the one that the weight decay goes by.
    """
    import tensorflow as tf

    step = tf.cast(optimizer.iterations + 1, "float32")
    first, second = optimizer.beta_1, optimizer.beta_2
    rate, decay_rate = (tf.cast(each, "float32") for each in rates)
    if optimizer.weight_decay:
        variable.assign(variable * (1 - optimizer.weight_decay * decay_rate))
    tf.raw_ops.ResourceApplyAdam(
        var=variable.handle,
        m=moments[0].value.handle,
        v=moments[1].value.handle,
        beta1_power=first**step,
        beta2_power=second**step,
        lr=rate,
        beta1=first,
        beta2=second,
        epsilon=optimizer.epsilon,
        grad=tf.convert_to_tensor(gradient),
    )
    if average is not None:
        # Before the first step there is no average yet.
        share = tf.where(step > 1, 1 - optimizer.ema_momentum, 1.0)
        tf.raw_ops.ResourceApplyGradientDescent(
            var=average.value.handle,
            alpha=share,
            delta=average.value - variable,
        )


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
    """Whether all that computes does so in hardware."""
    devices = accelerators()
    if not devices:
        return _cpu_multiplies_bfloat16()
    return all(_capability(each) >= AMPERE for each in devices)


def _capability(device: Any) -> tuple[int, ...]:
    """CUDA's compute capability of a device; what is no GPU has enough."""
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
