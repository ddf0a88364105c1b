"""The notebook, executed as Jupyter does, without network."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from captioning.data.sample import write_sample
from tests.scripts import ROOT

NAME = Path("docs") / "captioning.ipynb"
TINY = (
    "--run-name quick --dataset tiny --encoder scenes --image-size 64 "
    "--encoder-weights random --epochs 1 --batch-images 4 --beam-size 2 "
    "--max-caption-length 5 --decoder-units 8 --attention-units 8 "
    "--embedding-units 8 --limit-images 8"
)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A copy of the project; `python` is that of the tests."""
    for name in ("*.py", "*.txt", "captioning", str(NAME)):
        for source in ROOT.glob(name):
            place = tmp_path / source.relative_to(ROOT)
            place.parent.mkdir(exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, place)
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # What the requirements name is there already.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path


def execute(project: Path, heading: str, pattern: str, other: str) -> list:
    """Runs what comes before the first heading, and what is below one.

    Args:
        project: the folder of the project.
        heading: of the part.
        pattern: what to replace in its code, exactly once.
        other: by what.

    Returns:
        The outputs of the cells.
    """
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(project / NAME, 4)
    cells, inside, replaced = [], True, 0
    for cell in notebook.cells:
        if cell.source.startswith("## "):
            inside = cell.source.startswith(f"## {heading}\n")
        if inside and cell.cell_type == "code":
            cell.source, number = re.subn(pattern, lambda _: other, cell.source)
            replaced += number
            cells.append(cell)
    assert replaced == 1
    notebook.cells = cells
    resources = {"metadata": {"path": str(project / NAME.parent)}}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources
    )
    client.execute()
    return [output for cell in cells for output in cell.outputs]


def pictures(outputs: list) -> int:
    return sum("image/png" in each.get("data", {}) for each in outputs)


def printed(outputs: list) -> str:
    return "".join(each.get("text", "") for each in outputs)


def test_it_is_kept_without_outputs_and_address():
    cells = json.loads((ROOT / NAME).read_text(encoding="utf-8"))["cells"]
    code = [each for each in cells if each["cell_type"] == "code"]
    assert all(each["outputs"] == [] for each in code)
    assert all(each["execution_count"] is None for each in code)
    assert 'REPOSITORY = ""\n' in code[0]["source"]


def test_the_sample_runs_through_the_three_scripts(project):
    write_sample(project / "data" / "tiny", images=60)
    pattern = '(?<=QUICK = ").*(?=")'
    outputs = execute(project, "Train on the sample", pattern, TINY)
    assert pictures(outputs) > 1
    assert "report.html and open it" in printed(outputs)
    assert (project / "checkpoints" / "quick").is_dir()


def test_a_photograph_is_captioned(project, real_data):
    run = Path("checkpoints") / "pretrained"
    shutil.copytree(ROOT / run, project / run)
    pytest.importorskip("skimage")
    weights = real_data / "weights" / "xception_notop.weights.h5"
    outputs = execute(
        project,
        "Caption a photograph",
        "python caption.py",
        f"python caption.py --encoder-weights {weights}",
    )
    assert "photographer.png\ta man " in printed(outputs)
    assert pictures(outputs) == 1
