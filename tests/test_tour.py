"""docs/tour.ipynb: what it shows was run, is small, and runs again from top to bottom."""

import json
import re
import shutil

import pytest
from conftest import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"


def cells():
    return json.loads(TOUR.read_text())["cells"]


def texts(found):
    """What the cells printed."""
    return "".join(
        "".join(out.get("text", "")) for cell in found for out in cell.get("outputs", [])
    )


def test_the_tour_was_run_as_it_stands_and_is_small():
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(cells()) <= 25 and [cell["execution_count"] for cell in code] == list(
        range(1, len(code) + 1)
    )
    assert not any(out["output_type"] == "error" for cell in code for out in cell["outputs"])
    assert TOUR.stat().st_size < 1_000_000 and "/tmp" not in TOUR.read_text()


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
    nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
    shutil.copytree(
        ROOT, tmp_path / "here", ignore=shutil.ignore_patterns("runs", "datasets", ".*", "results")
    )
    notebook = nbformat.read(TOUR, 4)
    where = {"metadata": {"path": str(tmp_path / "here" / "docs")}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    said = texts(notebook.cells)
    pooler, cls = (
        float(re.search(rf"{name}: (0\.\d+)", said)[1]) for name in ("pooler", "CLS token")
    )
    assert pooler > 0.5 and 0 < cls < 1  # a minute is enough for the pooler to look at the figure
    assert (
        len(re.findall(r"\.png: .*(?:confidence|unknown)", said)) == 4
    )  # of two pictures, by two recognisers
