"""docs/tour.ipynb: what it shows was run, is small, and runs again from top to bottom."""

import json
import re
import shutil

import pytest
from conftest import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"


def test_the_tour_was_run_as_it_stands_and_is_small():
    cells = json.loads(TOUR.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    kinds = {out["output_type"] for cell in code for out in cell["outputs"]}
    assert "error" not in kinds and len(cells) <= 25
    assert TOUR.stat().st_size < 2_000_000 and "/tmp" not in TOUR.read_text()


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
    nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
    left_out = shutil.ignore_patterns("runs", "datasets", ".*", "results")
    shutil.copytree(ROOT, tmp_path / "here", ignore=left_out)
    drawn = ROOT / "datasets" / "toon"  # by the README's first command, if it has run: minutes
    if drawn.exists():
        shutil.copytree(drawn, tmp_path / "here" / "datasets" / "toon")
    notebook = nbformat.read(TOUR, 4)
    where = {"metadata": {"path": str(tmp_path / "here" / "docs")}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    said = ""
    for cell in notebook.cells:
        said += "".join(out.get("text", "") for out in cell.get("outputs", []))
    pooler, cls = (re.search(rf"{name}: (0\.\d+)", said)[1] for name in ("pooler", "CLS token"))
    assert float(pooler) > 0.5 and 0 < float(cls) < 1  # a minute is enough for the pooler
    answers = re.findall(r"\.png: .*(?:confidence|unknown)", said)
    assert len(answers) == 4  # of two pictures, by two recognisers
