"""What the tests share."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# JAX compiles what the scripts share once, and not in every process.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# What XLA compiles here runs once or twice: compile it fast, not to be fast.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
sys.path.insert(0, str(Path(__file__).parent.parent))

LONG = (
    "test_lost_process test_distribution test_pipeline test_scripts "
    "test_backends test_notebook test_export test_metrics"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the long files, so that all processes end together."""
    items.sort(key=lambda each: each.path.stem not in LONG)


@pytest.fixture
def float32():
    """Computes in float32, with random numbers that are always the same."""
    import keras

    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(1)  # NumPy's too
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def no_java(monkeypatch):
    """Finds no program, Java among them."""
    monkeypatch.setenv("PATH", "")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real photographs and encoder weights."""
    folder = os.environ.get("REAL_DATA_DIR")
    if not folder:
        pytest.skip("REAL_DATA_DIR names no folder with real photographs")
    return Path(folder)
