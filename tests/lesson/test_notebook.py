"""What the docs say of notebooks: its code runs, and a picture of any size becomes a view."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT, draw_folder, run_line
from PIL import Image

import data
from common.train import UserError


def test_the_code_of_the_page_runs_and_predicts_what_is_hidden(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/checkpoints.md").read_text()
    section = re.search(r"^## Our weights in a notebook\n.*?(?=^## )", page, re.S | re.M)
    names = {}
    exec(re.search(r"```python\n(.*?)```", section.group(), re.S)[1], names)
    view, predicted, where = (names[name] for name in ("view", "predicted", "where"))
    assert (predicted == view)[~where].all()  # what it has seen stays
    assert where.float().mean((1, 2)).allclose(torch.tensor(0.75))
    error = (predicted - view.float())[where].square().mean()
    for seen, true, hidden in zip(view, view.float(), where, strict=True):
        mean = seen[~hidden].float().mean(0)  # one colour for all that is hidden
        assert error < (mean - true[hidden]).square().mean()
    assert names["attention"].sum(1).allclose(torch.ones(2))


@pytest.mark.parametrize("size", [64, 160])
def test_a_picture_of_any_size_becomes_the_view_of_a_packed_set(tmp_path, size):
    """By its path, as Pillow opens it, and as pixels: all of them, to the bit."""
    folder = draw_folder(tmp_path / "images", classes=1, each=10)
    wide = Image.effect_noise((300, 200), 90).convert("RGBA")
    wide.putalpha(Image.linear_gradient("L").resize(wide.size))
    wide.save(folder / "class0/wide.png")
    run_line(
        f"data.py images --out packed --split 1,0,0 --size {max(128, size)}", tmp_path, check=0
    )
    split = data.open_split(tmp_path / "packed", "train")
    row = torch.tensor([split["header"]["keys"].index("class0/wide.png")])
    [(_, packed)] = data.whole_views(split["images"], row, size, torch.device("cpu"))
    path = folder / "class0/wide.png"
    for picture in (
        path,
        str(path),
        Image.open(path),
        np.asarray(wide),
        split["images"][row.item()],
    ):
        assert torch.equal(data.read_view(picture, size), packed)


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    pixels = np.zeros((8, 8, 3), np.uint8)
    wrong = (tmp_path / "text.png", tmp_path / "missing.png", pixels / 255, pixels[None])
    for picture in wrong:
        with pytest.raises(UserError):
            data.read_view(picture, 64)
