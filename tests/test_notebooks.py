"""The notebooks run from top to bottom, in an empty folder and without a network, and show plots and tables."""

import re
import subprocess
from pathlib import Path

import grids
import nbformat
import pytest
import tiny_run  # noqa: F401 - the kernels share its cache of compiled programs
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIRST = "quickstart"  # the others call what tests/api calls


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_results(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert first == next(cell.source for cell in nbformat.read(NOTEBOOKS[0], 4).cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.parametrize("name", grids.everyday([path.stem for path in NOTEBOOKS], FIRST))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the client's own loop
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "4")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()  # raises for a cell that does
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in data for data in shown) and any("text/html" in data for data in shown)


def test_the_first_cell_installs_what_it_clones(tmp_path: Path) -> None:
    """The lines for Colab, in an empty folder, with this checkout in the place of the address."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout that can be cloned")
    cells = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4).cells
    lines = next(cell.source for cell in cells if cell.cell_type == "code").splitlines()
    (clone,) = (line.strip("! ") for line in lines if line.strip().startswith("!git clone "))
    (install,) = (line.strip() for line in lines if line.strip().startswith("%pip install "))
    subprocess.run(["bash", "-c", clone.replace("{ADDRESS}", str(ROOT))], cwd=tmp_path, check=True, capture_output=True)
    folder = re.search(r"'\./(\w+)\[\{extras\}\]'", install)
    assert folder and (tmp_path / folder[1] / "pyproject.toml").is_file()
