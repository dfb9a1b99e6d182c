"""maps.py as a user runs it, and the algorithms of maps.py on pictures whose truth is drawn."""

import json
import shlex
import sys

import golden
import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused, stage
from safetensors import safe_open

import data
import maps
import mask as masking
from common import guidance
from common.command import LOCKS
from common.io import UserError
from common.train import seeded
from experiments.map_quality import auc_of, iou


def drawn(n=12, side=64, seed=0):
    """Disks on a gradient: images u8 (n, side, side, 3) and the true figure, bool (n, side, side)."""
    g = seeded(seed)
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    centre = 0.5 * torch.rand(2, n, 1, 1, generator=g) - 0.25
    figure = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 0.35
    colour = torch.rand(3, n, 1, 1, 3, generator=g)
    ground = colour[0] + 0.25 * (colour[1] - 0.5) * x[..., None]
    texture = 0.03 * torch.randn(n, side, side, 3, generator=g)
    away = (colour[0] + 0.5) % 1  # a colour that is not the ground's
    return (
        255 * (torch.where(figure[..., None], away, ground) + texture).clamp(0, 1)
    ).byte(), figure


def here(*words):
    """maps.py with these words, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["maps.py", *map(str, words)])
        with LOCKS:
            maps.main()


@pytest.fixture(scope="module")
def made(small, run, tmp_path_factory):
    """All the maps of the small set -> their folder."""
    out = tmp_path_factory.mktemp("maps")
    here("--data", small, "--map", "saliency", "--out", out)
    here("--data", small, "--map", "attn", "--attention", "cls", "--run", run, "--out", out)
    here("--data", small, "--map", "parts", "--parts", 3, "--run", run, "--out", out)
    return out


# ---- the algorithms ------------------------------------------------------------------------------


def test_coarse_finds_drawn_figures():
    images, figure = drawn()
    found, true = (maps.to_patches(m, 12) for m in (maps.coarse(images), figure))
    scores = [auc_of(f, t > 0.5) for f, t in zip(found, true, strict=True)]
    assert np.mean(scores) > 0.95 and min(scores) > 0.85  # the centre alone has .93
    assert iou(found > 0.5, true > 0.5) > 0.7


@pytest.mark.parametrize("fill", [0, 7, 255])
def test_a_picture_of_one_colour_gives_finite_maps(fill):
    images = torch.full((2, 40, 40, 3), fill, dtype=torch.uint8)
    found = maps.coarse(images)
    assert found.shape == (2, maps.GRID, maps.GRID) and found.isfinite().all()
    assert found.min() >= 0 and found.max() <= 1


def test_lab_is_that_of_others():
    color = pytest.importorskip("skimage.color")
    images = torch.randint(0, 256, (1, 16, 16, 3), generator=seeded(0), dtype=torch.uint8)
    assert np.abs(maps.to_lab(images)[0].numpy() - color.rgb2lab(images[0].numpy())).max() < 0.05


def test_geodesic_distance_goes_around_a_wall_and_is_free_on_flat_ground():
    colours = torch.zeros(1, 5, 5, 1)
    colours[0, :4, 2] = 50.0  # a wall with a gap at the bottom
    closed = colours.clone()
    closed[0, 4, 2] = 50.0
    left, right = 0, 4
    assert maps.geodesic(colours)[0, left, right] == 0
    assert maps.geodesic(closed)[0, left, right] == 2 * (50 - maps.NOISE)
    distance = maps.geodesic(torch.rand(2, 5, 5, 3, generator=seeded(1)) * 40)
    assert torch.equal(distance, distance.transpose(1, 2))
    assert (
        distance[:, :, :, None] + distance[:, None] >= distance[:, :, None].transpose(2, 3) - 1e-3
    ).all()


def test_the_border_leaves_out_the_lower_edge():
    edge = maps.border(6).view(6, 6)
    assert edge[0].all() and edge[:, 0].all() and edge[:, -1].all()
    assert not edge[-1, 1:-1].any() and not edge[1:-1, 1:-1].any()


def test_clusters_are_found_again_and_numbered_by_size():
    g = seeded(5)
    groups = torch.randn(5, 1, 4, generator=g) * 6 + torch.randn(5, 60, 4, generator=g)
    sizes = (60, 50, 40, 30, 20)
    x = torch.cat([group[:n] for group, n in zip(groups, sizes, strict=True)])
    centres = maps.kmeans(x, 5)
    assert torch.equal(centres, maps.kmeans(x, 5))
    label = torch.cdist(x, centres).argmin(1)
    assert torch.bincount(label, minlength=5).tolist() == list(sizes)


def test_parts_are_those_of_the_figure_only():
    tokens, figure = (
        torch.randn(3, 16, 4, generator=seeded(0)),
        torch.zeros(3, 16, dtype=torch.bool),
    )
    figure[0] = True
    figure[1, 3] = True  # and the third picture has no figure at all
    parts = maps.parts_of(tokens, figure, tokens.mean(0), torch.randn(5, 4, generator=seeded(1)))
    assert parts.dtype == torch.uint8 and torch.equal(parts > 0, figure) and parts.max() <= 5


# ---- the files -----------------------------------------------------------------------------------


def test_files_hold_what_the_docstring_says(small, run, made):
    train = data.open_split(small, "train")
    n = len(train["images"])
    expected = {
        "saliency": ((n, 32, 32), np.uint8),
        "attn": ((n, 4, 4), np.float16),
        "parts": ((n, 4, 4), np.uint8),
    }
    assert {p.name for p in made.iterdir()} == {f"{m}.safetensors" for m in expected} | {
        f"sheet-{m}.png" for m in expected
    }
    for name, (shape, dtype) in expected.items():
        found = data.open_map(made, name, train)
        assert found.shape == shape and found.dtype == dtype
        with safe_open(made / f"{name}.safetensors", "pt") as f:  # as anybody else reads it
            about = json.loads(f.metadata()["animask"])
        assert about["map"] == name and about["grid"] == shape[1] and about["images"] == n
        assert (
            about["data_digest"] == data.fingerprint(train)
            and about["split"] == "train"
            and about["commit"]
        )
        assert about["by"] == ("" if name == "saliency" else str(run))
    assert data.open_tensors(made / "parts.safetensors")["header"]["parts"] == 3
    assert data.open_map(made, "parts", train).max() <= 3
    attention = data.open_map(made, "attn", train).astype(np.float32)
    assert (attention > 0).all() and (attention.sum((1, 2)) < 1).all()  # CLS keeps some for itself


@pytest.mark.slow
def test_same_command_same_bytes(small, run, made, tmp_path):
    here("--data", small, "--map", "saliency", "--out", tmp_path)
    words = ("--map", "parts", "--parts", 3, "--run", run)
    stage(
        "maps.py", "--data", small, *words, "--out", tmp_path, cwd=tmp_path, check=0
    )  # in a process of its own
    for name in ("saliency", "parts"):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (
            made / f"{name}.safetensors"
        ).read_bytes()


def test_rows_are_in_the_order_of_the_images(small, made):
    train = data.open_split(small, "train")
    found = maps.coarse(torch.from_numpy(np.array(train["images"][5:7]))) * 255
    assert np.abs(data.open_map(made, "saliency", train)[5:7] - found.numpy()).max() <= 1


def test_cls_and_another_split(small, run, tmp_path):
    out = ("--data", small, "--split", "val", "--out", tmp_path)
    here("--map", "saliency", *out)
    here("--map", "attn", "--attention", "cls", "--run", run, *out)
    val = data.open_split(small, "val")
    assert data.open_map(tmp_path / "saliency-val.safetensors", "saliency", val).shape == (
        len(val["images"]),
        32,
        32,
    )
    assert data.open_tensors(tmp_path / "attn-val.safetensors")["header"]["source"] == "cls"
    with pytest.raises(UserError, match="--map saliency --out"):  # val's maps are not train's
        data.open_map(tmp_path, "saliency", data.open_split(small, "train"))


def test_a_hot_cell_follows_crop_and_flip():
    """What the figure is in the image is the figure in the view, wherever the crop moved it."""
    hot = torch.zeros(1, 32, 32, dtype=torch.uint8)
    hot[0, 8:12, 20:24] = 255
    for flip in (False, True):
        view = data.view_maps(hot, torch.tensor([[0.25, 0.5, 0.5, 0.5]]), torch.tensor([flip]), 8)[
            0
        ]
        rows, columns = torch.where(
            view > 0.7 * view.max()
        )  # the crop begins at row 8 and column 16 of the map
        assert set(rows.tolist()) == {0, 1} and set(columns.tolist()) == (
            {4, 5} if flip else {2, 3}
        )


# ---- the lines that are printed ------------------------------------------------------------------


def next_command(text):
    """-> flags of the command that stands behind "next: python pretrain.py"."""
    line = text.splitlines()[-1]
    assert line.startswith("next: python pretrain.py "), line
    return shlex.split(line)[3:]


def test_the_next_command_finds_these_maps(small, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    attn = ("--map", "attn", "--run", run)
    for words, flags in (
        (("--map", "saliency"), ["--mask", "fg_heavy"]),
        (("--map", "saliency", "--out", "my maps"), ["--mask", "fg_heavy", "--maps", "my maps"]),
        (attn, ["--mask", "attn_high", "--teacher", "maps"]),
        ((*attn, "--out", "else"), ["--mask", "attn_high", "--teacher", "maps", "--maps", "else"]),
    ):
        here("--data", small, *words)
        found = next_command(capsys.readouterr().out)
        assert found == ["--data", str(small), *flags]
        need, where = (
            maps.NEEDED_AS[words[1]],
            dict(zip(found, found[1:], strict=False)).get("--maps", "auto"),
        )
        assert (
            guidance.open_maps(need, where, small, data.open_split(small, "train"))[0] is not None
        )
    here("--data", small, "--map", "saliency", "--split", "val")
    assert "maps of val guide no training" in capsys.readouterr().out.splitlines()[-1]


def test_an_estimate_of_exact_masks_says_so(run, tmp_path, monkeypatch, capsys):
    golden.write_packed(tmp_path / "true", 32, (("train", 40), ("val", 4)))
    monkeypatch.chdir(tmp_path)
    here("--data", "true", "--map", "saliency")
    text = capsys.readouterr().out
    train = data.open_split("true", "train")
    assert "true has exact foreground masks" in text
    assert next_command(text) == ["--data", "true", "--mask", "fg_heavy", "--maps", "maps/true"]
    assert guidance.open_maps("fg", "auto", "true", train)[2].startswith(
        "the true"
    )  # the exact ones
    here("--data", "true", "--map", "parts", "--parts", 3, "--run", run)
    text = capsys.readouterr().out
    assert next_command(text)[-2:] == ["--maps", "maps/true"]


def test_maps_and_their_sheet_are_replaced_by_nothing(small, tmp_path):
    words = ("--data", small, "--map", "saliency", "--out", tmp_path)
    here(*words)
    for name in ("saliency.safetensors", "sheet-saliency.png"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} is there already"):
            here(*words)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


# ---- refusals ------------------------------------------------------------------------------------


def test_what_maps_refuses(small, run, made, tmp_path):
    def no(*words):
        with pytest.raises(UserError) as problem:
            here("--data", small, "--out", tmp_path, *words)
        return str(problem.value)

    assert "--run RUN" in refused(
        call("maps.py", "--data", small, "--out", tmp_path, "--map", "attn", cwd=ROOT)
    )
    assert "--parts 0" in no("--map", "parts", "--run", run, "--parts", 0)
    assert "--attention" in no("--map", "saliency", "--attention", "cls")
    assert "--run" in no("--map", "saliency", "--run", run)
    for words, flag in (
        (("--parts", 3), "parts"),
        (("--attention", "cls"), "attention"),
    ):
        assert no("--map", "saliency", *words).startswith(f"--{flag} has no effect")
    (tmp_path.parent / "a file").write_text("mine")
    assert "is a file" in no("--map", "saliency", "--out", tmp_path.parent / "a file" / "maps")
    assert "nowhere" in no("--map", "attn", "--run", tmp_path / "nowhere")
    before = (made / "saliency.safetensors").read_bytes()
    assert "is there already" in no("--map", "saliency", "--out", made)
    assert (made / "saliency.safetensors").read_bytes() == before and not list(tmp_path.iterdir())


def test_what_open_map_refuses(small, made, tmp_path):
    train, val = data.open_split(small, "train"), data.open_split(small, "val")
    n, about = len(train["images"]), data.open_tensors(made / "saliency.safetensors")["header"]

    def write(name, shape, header):
        data.write_maps(
            tmp_path / name, "saliency", [np.zeros(shape, np.uint8)], shape, "U8", header
        )
        return tmp_path / name

    for path, split, kind, words in (
        (
            tmp_path / "none",
            train,
            "attn",
            ("no attn maps", f"python maps.py --data {small} --map attn"),
        ),
        (
            made / "saliency.safetensors",
            train,
            "parts",
            ("no array 'parts'", "--map parts"),
        ),
        (made / "saliency.safetensors", val, "saliency", ("another data set", "--split val")),
        (small / "train.safetensors", train, "saliency", ("another data set", "--out OTHER")),
        (
            write("few.safetensors", (n - 1, 32, 32), about),
            train,
            "saliency",
            ("not", str((n, 32, 32))),
        ),
    ):
        with pytest.raises(UserError) as problem:
            data.open_map(path, kind, split)
        assert all(word in str(problem.value) for word in words), problem.value
    whole = (made / "saliency.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole file"):
        data.open_map(tmp_path / "cut.safetensors", "saliency", train)


# ---- sheets --------------------------------------------------------------------------------------


def test_a_sheet_shows_every_strategy_whose_scores_are_known(small, run, tmp_path, monkeypatch):
    golden.write_packed(tmp_path / "true", 32, (("train", 8), ("val", 4)))
    shown = {}
    monkeypatch.setattr("common.plots.image_grid", lambda path, title, rows, _: shown.update(rows))
    words = ("--map", "attn", "--run", run, "--split", "val")
    here("--data", tmp_path / "true", *words, "--out", tmp_path / "a")
    drawn = [name for name in masking.STRATEGIES if name != "learned"]
    assert [*shown] == ["image", "attn", *drawn]
    assert all(len(pictures) == 3 * maps.SHOWN for pictures in shown.values())
    shown.clear()
    here("--data", small, *words, "--out", tmp_path / "b")  # it has no true masks
    assert not shown.keys() & {"fg_heavy", "parts"} and "attn_low" in shown


@pytest.mark.parametrize("strategy", sorted(set(masking.STRATEGIES) - set(masking.NEEDS)))
def test_a_sheet_shows_exactly_what_is_hidden(strategy):
    for ratio in maps.RATIOS:
        h = maps.hidden_by(strategy, {}, 5, 6, ratio)
        assert h.shape == (5, 6, 6) and (h.flatten(1).sum(1) == 36 - masking.kept(36, ratio)).all()
