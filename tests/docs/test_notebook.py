"""examples/quickstart.ipynb runs from the first cell to the last, and is kept without what it printed."""

import json
from pathlib import Path

import pytest

from tests.support.runs import ROOT, tiny_job

NOTEBOOK = ROOT / "examples/quickstart.ipynb"
LEFT_OUT = {"data", "runs", "examples"}


def test_it_is_kept_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow  # it starts a kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning")
def test_it_runs(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for path in ROOT.iterdir():
        if path.name not in LEFT_OUT and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "examples").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before, _, _ = notebook.cells[1].source.partition("SIZE = ")
    notebook.cells[1].source = f"{before}SIZE = {' '.join(tiny_job())!r}"
    resources = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=250, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the curves"
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert printed.count("Run folder: runs/dense_") == 2
    assert "Traceback" not in printed
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"dense_prenorm", "dense_spannorm"}
