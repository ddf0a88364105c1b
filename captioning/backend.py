"""What differs between backends, processors and accelerators."""

from pathlib import Path

import keras

from config import Config

# TensorFlow takes batches of any length, so that captions are packed without
# padding. JAX compiles anew for each length and gets padded batches.
PACKED = keras.backend.backend() == "tensorflow"


def use_xla() -> bool:
    """Whether to compile with XLA.

    TensorFlow's own kernels are faster than XLA's on a CPU, and an unrolled
    loop takes XLA minutes to compile there.
    """
    return keras.backend.backend() != "tensorflow" or _has_gpu()


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
