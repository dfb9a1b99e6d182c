"""apps.maps as a user runs it, and its algorithms on pictures whose truth is drawn; how true maps are."""

import json
import shlex

import numpy as np
import pytest
import torch
from conftest import call, refused, run_line
from safetensors import safe_open
from sklearn.metrics import jaccard_score, roc_auc_score

import data
from apps import maps
from common import guidance
from common.train import UserError, seeded
from ingest import toon
from lab import map_quality

ATTN, PARTS = "--map attn --run runs/a", "--map parts --run runs/a --parts 3"


@pytest.fixture(scope="module")
def base(base):
    """A home with all maps of datasets/packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.plots.image_grid", lambda *_: None)  # sheets take most of the time
        for words in (f"{ATTN} --attention cls", PARTS):
            run_line(f"apps.maps --data datasets/packed --device cpu {words}", base, check=0)
        yield base


def drawn(n=12, side=64):
    """Disks on a gradient: images u8 (n, side, side, 3) and the true figure, bool (n, side, side)."""
    g = seeded(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    centre = 0.5 * torch.rand(2, n, 1, 1, generator=g) - 0.25
    figure = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 0.35
    colour = torch.rand(3, n, 1, 1, 3, generator=g)
    ground = colour[0] + 0.25 * (colour[1] - 0.5) * x[..., None]
    away = (colour[0] + 0.5) % 1  # a colour that is not the ground's
    pixels = torch.where(figure[..., None], away, ground)
    pixels = pixels + 0.03 * torch.randn(n, side, side, 3, generator=g)
    return (255 * pixels.clamp(0, 1)).byte(), figure


def test_coarse_finds_drawn_figures():
    images, figure = drawn()
    found, true = (maps.to_patches(m, 12) for m in (maps.coarse(images), figure))
    scores = [roc_auc_score(t > 0.5, f) for f, t in zip(found, true, strict=True)]
    assert np.mean(scores) > 0.95 and min(scores) > 0.85  # the centre alone has 0.93
    assert jaccard_score((true > 0.5).flatten(), (found > 0.5).flatten()) > 0.7
    edge = maps.border(6).view(6, 6)  # all but the lower one
    assert edge[0].all() and edge[:, 0].all() and edge[:, -1].all() and edge.sum() == 16


@pytest.mark.parametrize("fill", [0, 7, 255])
def test_a_picture_of_one_colour_gives_finite_maps(fill):
    found = maps.coarse(torch.full((2, 40, 40, 3), fill, dtype=torch.uint8))
    assert found.shape == (2, maps.GRID, maps.GRID) and found.isfinite().all()
    assert found.min() >= 0 and found.max() <= 1


def test_lab_is_that_of_others():
    color = pytest.importorskip("skimage.color")
    images = torch.randint(0, 256, (1, 16, 16, 3), generator=seeded(0), dtype=torch.uint8)
    assert np.abs(maps.to_lab(images)[0].numpy() - color.rgb2lab(images[0].numpy())).max() < 0.05


def test_geodesic_distance_is_the_shortest_path_of_scipy():
    from scipy.sparse.csgraph import shortest_path

    colours = torch.rand(1, 5, 5, 3, generator=seeded(1)) * 40
    x, place = colours.view(25, 3), np.arange(25)
    row, column = place // 5, place % 5
    near = (abs(row[:, None] - row) <= 1) & (abs(column[:, None] - column) <= 1)
    cost = (torch.cdist(x, x) - maps.NOISE).clamp(min=1e-9).numpy() * near
    expected = torch.from_numpy(shortest_path(cost))[None].float()
    torch.testing.assert_close(maps.geodesic(colours), expected, atol=1e-4, rtol=1e-4)


def test_clusters_are_found_again_and_numbered_by_size_and_parts_are_the_figures():
    g, sizes = seeded(5), (60, 50, 40, 30, 20)
    groups = torch.randn(5, 1, 4, generator=g) * 6 + torch.randn(5, 60, 4, generator=g)
    x = torch.cat([group[:n] for group, n in zip(groups, sizes, strict=True)])
    centres = maps.kmeans(x, 5)
    assert torch.equal(centres, maps.kmeans(x, 5))
    label = torch.cdist(x, centres).argmin(1)
    assert torch.bincount(label, minlength=5).tolist() == list(sizes)
    tokens, figure = torch.randn(3, 16, 4), torch.zeros(3, 16, dtype=torch.bool)
    figure[0] = True
    figure[1, 3] = True  # and the third picture has no figure at all
    parts = maps.parts_of(tokens, figure, tokens.mean(0), centres)
    assert parts.dtype == torch.uint8 and torch.equal(parts > 0, figure) and parts.max() <= 5


@pytest.mark.parametrize(
    ("name", "grid", "dtype"),
    [("saliency", 32, np.uint8), ("attn", 4, np.float16), ("parts", 4, np.uint8)],
)
def test_files_hold_what_the_docstring_says(at, name, grid, dtype):
    train = data.open_split("datasets/packed", "train")
    n, found = len(train["images"]), data.open_map("maps/packed", name, train)[0]
    assert found.shape == (n, grid, grid) and found.dtype == dtype
    with safe_open(f"maps/packed/{name}.safetensors", "pt") as f:  # as anybody else reads it
        about = json.loads(f.metadata()["animask"])
    expected = {"map": name, "grid": grid, "images": n}
    expected |= {"by": "" if name == "saliency" else "runs/a"}
    assert {key: about[key] for key in expected} == expected and about["commit"]
    assert about["data_digest"] == data.fingerprint(train)
    if name == "parts":
        assert found.max() <= about["parts"] == 3
    elif name == "attn":
        attention = found.astype(np.float32)  # CLS keeps some for itself
        assert (attention > 0).all() and (attention.sum((1, 2)) < 1).all()
    else:  # in the order of the images
        again = maps.coarse(torch.from_numpy(np.array(train["images"][5:7]))) * 255
        assert np.abs(found[5:7] - again.numpy()).max() <= 1


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("--map saliency --out 'my maps'", "--mask fg_heavy --maps 'my maps'"),
        (f"{ATTN} --out else", "--mask attn_high --teacher maps --maps else"),
    ],
)
def test_the_next_command_finds_these_maps(at, words, flags):
    line = shlex.split(f"--data datasets/packed --device cpu {words}")
    text = call("apps.maps", *line, cwd=at, check=0).stdout
    assert text.splitlines()[-1].endswith(f"python pretrain.py --data datasets/packed {flags}")
    need, train = maps.KINDS[line[5]].need, data.open_split("datasets/packed", "train")
    found = guidance.open_maps(need, line[-1], "datasets/packed", train)[0]
    assert found is not None


def test_a_sheet_has_every_strategy_whose_score_is_known(at, bright, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "common.plots.image_grid", lambda path, _, rows, *__: drawn.update(dict(rows))
    )
    run_line("apps.maps --data datasets/packed --map saliency --out sheet --device cpu", at, 0)
    assert {"image", "saliency", "bright", "random", "fg_heavy"} < drawn.keys()
    assert "learned" not in drawn


def test_maps_of_another_data_set_are_refused(at):
    with pytest.raises(UserError, match="another data set"):
        data.open_map("maps/packed", "saliency", data.open_split("datasets/packed", "val"))


def test_measures_of_maps_are_what_their_names_say():
    truths = torch.tensor([[True, False] * 3, [True] * 6])  # the second says nothing
    assert map_quality.mean_auc(torch.ones(2, 6), truths) == 0.5
    assert map_quality.mean_auc(truths.float(), truths) == 1.0
    assert map_quality.mean_auc(-truths.float(), truths) == 0.0
    parts = torch.zeros(1, 4, 4, dtype=torch.uint8)
    parts[0, :2, :2] = torch.tensor([[1, 1], [1, 2]])
    assert map_quality.main_part(parts, 2).tolist() == [[1, 0, 0, 0]]
    attention = torch.ones(500, 16)
    assert map_quality.how_often_hidden(attention).mean(0).allclose(torch.tensor(0.75), atol=0.03)
    attention[:, 3] = 9.0  # four deviations above the others
    often = map_quality.how_often_hidden(attention).mean(0)
    assert often[3] > 0.93 and often.sum().allclose(torch.tensor(12.0))


def test_the_command_writes_scores_in_their_range_to_one_file(at, monkeypatch):
    drawn = [toon.draw(item, 32) for item in toon.plan(n=4, characters=2)]
    planes = (np.stack([d[name] for d in drawn]) for name in ("image", "fg", "parts"))
    images, fg, parts = map(torch.from_numpy, planes)
    truth = images, fg / 255, parts, toon.PARTS
    monkeypatch.setattr(map_quality, "true_set", lambda folder, split: truth)
    words = "lab.map_quality runs/a --data datasets/packed"
    run_line(words, at, check=0)
    (file,) = (at / "runs/a").rglob("map_quality.json")
    found = json.loads(file.read_text())
    assert found["images"] == 4 and found["rows"][0]["map"] == "coarse"
    for row in found["rows"]:
        assert 0 <= row.get("auc", 0) <= 1 and -0.5 <= row.get("ari", 0) <= 1
        assert "hidden" not in row["map"] or 0 <= row["hair"] <= 1
    assert "is there already" in refused(run_line(words, at))
