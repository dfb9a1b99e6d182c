"""docs/tour.ipynb: what it shows was run, is small, and runs again from top to bottom."""

import base64
import io
import json
import re
import shutil

import pytest
from conftest import ROOT
from PIL import Image

TOUR = ROOT / "docs" / "tour.ipynb"


def cells():
    return json.loads(TOUR.read_text())["cells"]


def test_the_tour_was_run_as_it_stands_and_is_small():
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    outputs = [out for cell in code for out in cell["outputs"]]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert "error" not in {out["output_type"] for out in outputs}
    assert "/tmp" not in "".join(line for out in outputs for line in out.get("text", []))
    assert TOUR.stat().st_size < 2_000_000


def test_figures_can_be_read_on_a_dark_page():
    """Their ground is white, and not what lies behind them."""
    outputs = [out for cell in cells() for out in cell.get("outputs", [])]
    figures = [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    assert len(figures) >= 10
    for figure in figures:
        picture = Image.open(io.BytesIO(base64.b64decode(figure)))
        assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_each_section_ends_with_an_exercise():
    text = "\n\n".join("".join(cell["source"]) for cell in cells())
    _, *sections = re.split(r"^## (?=\d)", text.partition("## What next")[0], flags=re.M)
    assert len(sections) == 10
    for section in sections:
        assert section.strip().split("\n\n")[-1].startswith("**Exercise.** "), section[:30]


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
    client = nbclient.NotebookClient(notebook, timeout=3600, resources=where)  # seconds of a cell
    client.execute()
    said = ""
    for cell in notebook.cells:
        said += "".join(out.get("text", "") for out in cell.get("outputs", []))
    pooler, cls = (re.search(rf"{name}: (0\.\d+)", said)[1] for name in ("pooler", "CLS token"))
    assert float(pooler) > 0.5 and 0 < float(cls) < 1  # a minute is enough for the pooler
    top1 = dict(re.findall(r"^(chance|random-init|runs/tour-random)\b.* (\d+\.\d) %", said, re.M))
    assert float(top1["runs/tour-random"]) > float(top1["random-init"]) > float(top1["chance"])
    answers = re.findall(r"\.png: .*(?:confidence|unknown)", said)
    assert len(answers) == 4  # of two pictures, by two recognisers
