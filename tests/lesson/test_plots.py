"""common/plots.py: what the pictures of a run cover."""

import pytest
import torch

from common import evaluate, plots
from common.door import drawing

PARTS = ("background", "hair", "face", "eyes", "mouth")


def log(most):
    """A log of ten evaluations, with curves that go from corner to corner."""
    for epoch in range(10):
        share = epoch / 9
        row = {"epoch": epoch, "loss": 1 - share, "val_mse": share}
        row |= {"knn": most * share, "linear": most * (1 - share)}
        row |= {"knn_thumbnail": most / 2, "linear_thumbnail": most / 3}
        yield row | {"attention_on": {part: i * share for i, part in enumerate(PARTS)}}


@pytest.fixture
def drawn(monkeypatch):
    """drawn(rows) -> the figure of plots.curves, laid out."""

    def drawn(rows):
        kept = []
        monkeypatch.setattr(plots, "save", lambda figure, _: kept.append(figure))
        plots.curves("curves.png", rows, "val", "a run")
        kept[0].canvas.draw()
        return kept[0]

    yield drawn
    plots.plt.close("all")


def test_a_log_whose_first_rows_were_moved_away_is_drawn(drawn):
    rows = [{k: v for k, v in row.items() if "thumbnail" not in k} for row in log(1)]
    assert len(drawn(rows).axes) == len(drawn([*log(1)]).axes)


def test_masks_are_drawn_as_the_encoder_sees_them(tmp_path, monkeypatch):
    """With throw, some patches are neither seen nor predicted."""
    drawn = {}
    monkeypatch.setattr(plots, "image_grid", lambda path, title, lines: drawn.update(lines))
    view = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    ids_keep = torch.tensor([[0, 5, 7], [15, 1, 2]])  # of 16 patches of 8 px
    evaluate.draw_masks(tmp_path, view, {}, torch.rand(2, 16), ids_keep, 8)
    seen = (drawn["seen"] == view).all(3).unflatten(2, (4, 8)).unflatten(1, (4, 8)).all(4).all(2)
    assert [row.flatten().nonzero()[:, 0].tolist() for row in seen] == [[0, 5, 7], [1, 2, 15]]


def test_a_name_is_text_in_a_figure_and_a_figure_that_fails_is_a_line(tmp_path, capsys):
    plots.confusion(tmp_path / "c.png", [[1, 0], [0, 1]], ["$_$", "$\\frac$"], "$^$")
    assert (tmp_path / "c.png").stat().st_size
    with drawing("c.png"):
        raise RuntimeError("no\nfigure")
    assert capsys.readouterr().err == "note: c.png could not be drawn (no figure)\n"


def test_counts_stand_in_the_cells_where_they_can_be_read(monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "save", lambda figure, _: kept.append(figure))
    many = torch.eye(30, dtype=torch.long).tolist()
    for table in ([[2, 1], [0, 13]], [[2, 1], [0, 1300]], many):
        plots.confusion("c.png", table, [f"class{i}" for i in range(len(table))], "a run")
    cells = [[text.get_text() for text in figure.axes[0].texts] for figure in kept]
    assert cells == [["2", "1", "13"], [], []]
    plots.plt.close("all")


def test_a_name_that_no_font_can_draw_is_a_number_and_a_line_says_whose(tmp_path, capsys):
    name = "miku\U0003f000"  # no letter has this number
    plots.confusion(tmp_path / "c.png", [[1, 0], [0, 1]], ["rin", name], "a run")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"#2 {name}" in said[0] and "boxes" not in said[0]
    plots.image_grid(tmp_path / "i.png", "a title", [(name, [torch.zeros(8, 8, 3)])])
    assert "i.png: " in capsys.readouterr().err
