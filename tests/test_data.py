import io
import json
import shlex
import shutil
import subprocess
import sys
import types
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, draw_folder, refused, run_line, shared_file
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import data
from common.io import UserError
from ingest import decode, pack, sources, splits, tags, toon


def pack_images(source, out, *more, **kw):
    return call("data.py", source, "--out", out, *more, cwd=out.parent, **kw)


ABOUT = {"classes": ["a"], "crop": "centre", "margin": 0.1, "split": "train", "source": "x"}


def keys_of(out, split):
    return data.open_split(out, split)["header"]["keys"]


# ---- packing -------------------------------------------------------------------------------------


def test_a_folder_per_class_is_split_by_class_and_read_by_safetensors(tmp_path):
    draw_folder(tmp_path / "images", classes=3, each=20)
    pack_images(tmp_path / "images", tmp_path / "out", "--size", 24, check=0)
    counts = {}
    for split in ("train", "val", "test"):
        with safe_open(tmp_path / "out" / f"{split}.safetensors", "pt") as f:
            images, labels = f.get_tensor("images"), f.get_tensor("labels")
            header = json.loads(f.metadata()["animask"])
        assert images.dtype == torch.uint8 and images.shape[1:] == (24, 24, 3)
        for key, label in zip(header["keys"], labels.tolist(), strict=True):
            assert key.startswith(header["classes"][label] + "/")
        counts[split] = Counter(labels.tolist())
    assert counts == {
        "train": {0: 14, 1: 14, 2: 14},
        "val": {0: 2, 1: 2, 2: 2},
        "test": {0: 4, 1: 4, 2: 4},
    }


def test_same_input_same_bytes_and_another_seed_another_split(tmp_path):
    draw_folder(tmp_path / "images")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pack_images(tmp_path / "images", tmp_path / name, "--size", 16, "--seed", seed, check=0)
    read = {n: (tmp_path / n / "train.safetensors").read_bytes() for n in "abc"}
    assert read["a"] == read["b"] != read["c"]


def test_a_zip_gives_the_same_pixels_as_its_folder(tmp_path):
    draw_folder(tmp_path / "images")
    shutil.make_archive(
        tmp_path / "images", "zip", tmp_path, "images"
    )  # wrapped in one folder, as zips often are
    for source, out in (("images", "a"), ("images.zip", "b")):
        pack_images(tmp_path / source, tmp_path / out, "--size", 16, check=0)
    a, b = (data.open_split(tmp_path / n, "train") for n in "ab")
    assert a["header"]["classes"] == b["header"]["classes"] == ["class0", "class1", "class2"]
    assert sorted(x.tobytes() for x in a["images"]) and len(a["images"]) == len(b["images"])
    assert Counter(a["labels"].tolist()) == Counter(b["labels"].tolist())


def test_given_splits_are_kept_and_a_missing_val_and_dev_leave_train(tmp_path):
    for split, each in (("train", 20), ("test", 4)):
        draw_folder(tmp_path / "images" / split, classes=2, each=each, seed=each)
    pack_images(tmp_path / "images", tmp_path / "out", "--size", 16, "--dev", ".2", check=0)
    got = {s: keys_of(tmp_path / "out", s) for s in ("train", "dev", "val", "test")}
    assert all(k.startswith("train/") for s in ("train", "dev", "val") for k in got[s])
    assert all(k.startswith("test/") for k in got["test"]) and len(got["test"]) == 8
    assert len(got["val"]) == 4 and len(got["dev"]) == 7 and len(got["train"]) == 29
    assert data.open_split(tmp_path / "out", "train")["header"]["classes"] == ["class0", "class1"]


def test_groups_never_cross_splits(tmp_path):
    draw_folder(tmp_path / "images", classes=3, each=30)
    pack_images(
        tmp_path / "images",
        tmp_path / "out",
        "--size",
        16,
        "--group-by",
        "^(illust[0-9]+)_",
        check=0,
    )
    groups = {
        s: set(data.open_split(tmp_path / "out", s)["header"]["groups"])
        for s in ("train", "val", "test")
    }
    assert sum(len(g) for g in groups.values()) == len(set.union(*groups.values())) == 15


def test_a_flat_folder_has_no_labels(tmp_path):
    draw_folder(tmp_path / "images", classes=1)
    pack_images(tmp_path / "images" / "class0", tmp_path / "out", "--size", 16, check=0)
    split = data.open_split(tmp_path / "out", "train")
    assert (
        (split["labels"] == -1).all()
        and split["header"]["classes"] == []
        and not data.has_labels(split)
    )


def test_alpha_becomes_the_figure_and_paper_shows_through(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[8:24, 8:24] = (200, 10, 10, 255)
    (tmp_path / "images").mkdir()
    for i in range(10):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    pack_images(tmp_path / "images", tmp_path / "out", "--size", 32, "--dedupe", "off", check=0)
    split = data.open_split(tmp_path / "out", "train")
    assert split["fg"].shape == (7, 32, 32)
    assert (split["fg"][0] == pixels[..., 3]).all()
    assert (split["images"][0, 16, 16] == (200, 10, 10)).all() and (
        split["images"][0, 2, 2] == decode.PAPER
    ).all()


def test_broken_files_are_skipped_counted_and_named(tmp_path):
    root = draw_folder(tmp_path / "images", classes=3, each=30)
    whole = (root / "class0" / "illust0_0.png").read_bytes()
    (root / "class0" / "illust0_0.png").write_bytes(whole[:200])
    done = pack_images(root, tmp_path / "out", "--size", 16, check=0)
    assert "skipped 1" in done.stdout and "class0/illust0_0.png" in done.stdout
    splits = [data.open_split(tmp_path / "out", s) for s in ("train", "val", "test")]
    assert (
        sum(len(s["images"]) for s in splits) == 89
        and sum(s["header"]["skipped"] for s in splits) == 1
    )
    for s in splits:  # what comes after a gap still stands beside its own label
        for key, image, label in zip(s["header"]["keys"], s["images"], s["labels"], strict=True):
            assert key.startswith(f"class{label}/")
            truth = Image.open(root / key).convert("RGB")
            assert np.abs(np.asarray(truth).mean((0, 1)) - image.mean((0, 1))).max() < 12


def test_names_of_any_length_and_script_fit_into_the_header(tmp_path):
    names = [f"ラブライブ高坂穂乃果ちゃん/{i:05}.jpg" for i in range(30_000)]
    records, dims = [sources.Record(name, name, "a") for name in names], {"images": (1, 1, 3)}
    rows = ((r, {"images": np.zeros((1, 1, 3), np.uint8)}) for r in records)
    pack.write_split(
        tmp_path / "train.safetensors", rows, dims, records, {"a": 0}, ABOUT | {"size": 1}
    )
    assert keys_of(tmp_path, "train") == names


def test_a_folder_with_a_slash_behind_it_is_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(draw_folder(tmp_path / "images").parent)
    for name in ("images/", "images/", "images", "./images", str(tmp_path / "images")):
        assert data.open_or_pack(name, 16).as_posix() == "datasets/images"
    draw_folder(tmp_path / "other" / "images")
    with pytest.raises(UserError, match="packed from another place"):
        data.open_or_pack("other/images", 16)


def test_one_broken_file_of_a_small_split_is_skipped(tmp_path):
    for split, each in (("train", 30), ("test", 4)):
        draw_folder(tmp_path / "images" / split, classes=2, each=each)
    (tmp_path / "images" / "test" / "class0" / "illust0_0.png").write_bytes(b"no image")
    done = pack_images(tmp_path / "images", tmp_path / "out", "--size", 16, check=0)
    assert "skipped 1, the first: test/class0/illust0_0.png" in done.stdout


def test_an_alpha_channel_that_hides_nothing_is_no_figure(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(10):
        Image.effect_noise((32, 32), 60 + i).convert("RGBA").save(tmp_path / "images" / f"{i}.png")
    pack_images(tmp_path / "images", tmp_path / "out", "--size", 16, check=0)
    assert "fg" not in data.open_split(tmp_path / "out", "train")
    face = Image.new("RGB", (64, 64), (250, 250, 250))
    face.paste((200, 30, 30), (20, 10, 40, 50))
    boxes = []
    for mode in ("RGB", "RGBA"):
        with decode.open_image(saved_png(face.convert(mode)), 32) as (img, _):
            boxes.append(decode.foreground_box(img))
    assert boxes[0] == boxes[1] != (0, 0, 64, 64)


def saved_png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_packed_file_that_was_cut_is_refused(tmp_path):
    draw_folder(tmp_path / "images")
    pack_images(tmp_path / "images", tmp_path / "out", "--size", 16, check=0)
    path = tmp_path / "out" / "train.safetensors"
    whole = path.read_bytes()
    for part in (whole[:-100], whole[:50], b"", b"\xff" * 64):
        path.write_bytes(part)
        with pytest.raises(UserError, match="not a whole file"):
            data.open_split(tmp_path / "out", "train")


def test_a_split_that_does_not_fit_together_is_refused(tmp_path):
    tensors = {"images": torch.zeros(3, 8, 8, 3, dtype=torch.uint8), "labels": torch.arange(3)}
    about = ABOUT | {"size": 8, "keys": ["a", "b", "c"], "classes": ["x", "y", "z"]}
    wrong = {
        "no field 'keys'": (tensors, {k: v for k, v in about.items() if k != "keys"}),
        "no array 'labels'": ({"images": tensors["images"]}, about),
        "images is uint8": (tensors, about | {"size": 9}),
        "labels is int64": (tensors | {"labels": torch.arange(2)}, about),
        "labels are not in": (tensors | {"labels": torch.arange(1, 4)}, about),
        "fg is uint8": (tensors | {"fg": torch.zeros(3, 4, 4, dtype=torch.uint8)}, about),
    }
    for words, (arrays, header) in wrong.items():
        save_file(arrays, tmp_path / "train.safetensors", {"animask": json.dumps(header)})
        with pytest.raises(UserError, match=words):
            data.open_split(tmp_path, "train")


@pytest.mark.slow
def test_the_shared_faces_pack_whole(tmp_path):
    """The shared faces pack whole, by illustration, with nothing lost."""
    pack_images(
        shared_file("faces20.zip"),
        tmp_path / "out",
        "--size",
        32,
        "--group-by",
        "^[^_]+",
        "--dev",
        ".1",
        "--dedupe",
        "off",
        check=0,
    )
    splits = {s: data.open_split(tmp_path / "out", s) for s in ("train", "dev", "val")}
    assert {s: len(x["images"]) for s, x in splits.items()}["val"] == 1749
    assert len(splits["train"]["images"]) + len(splits["dev"]["images"]) == 8076
    groups = [set(x["header"]["groups"]) for x in splits.values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert len(splits["train"]["header"]["classes"]) == 20


def test_the_demo_set_records_tags_and_strata(monkeypatch):
    plan = toon.plan
    monkeypatch.setattr(toon, "plan", lambda **more: plan(**more | {"n": 480}))
    records, _, dims, _, stream, _ = pack.open_toon(32, 0)
    records = [r._replace(split="train") for r in records]
    words, _ = tags.vocabulary(records)
    dims, stream = tags.add_planes(words, records, dims, stream, thin=True)
    for record, row in stream(records[::160]):
        truth = toon.draw(record.place, 32)
        have = {plane: [words[i] for i in row[plane] if i >= 0] for plane in ("tags", "all_tags")}
        assert set(have["all_tags"]) == set(truth["tags"]) & set(words)
        assert set(have["tags"]) == set(tags.thinned(record)) & set(words) <= set(have["all_tags"])
        assert [v[i] for v, i in zip(toon.STRATA.values(), row["style"], strict=True)] == list(
            truth["style"].values()
        )
        assert {p: row[p].shape for p in dims} == dims
    assert len(words) == len(set(words)) > 80
    kept = [len(tags.thinned(r)) / len(r.tags) for r in records]
    assert (
        0.06 < np.mean(np.equal(kept, 0)) < 0.14 and 0.42 < np.mean(kept) < 0.48
    )  # some have none, others half


def test_show_draws_a_sheet_of_a_packed_set_and_of_the_crops(tmp_path):
    root = draw_folder(tmp_path / "images", classes=3, each=20)
    line = refused(call("data.py", "--show", tmp_path / "none", cwd=tmp_path))
    assert "does not exist" in line
    call("data.py", "--show", root, "--margin", ".2", cwd=tmp_path, check=0)
    pack_images(root, tmp_path / "out", "--size", 16, check=0)
    call("data.py", "--show", tmp_path / "out", cwd=tmp_path, check=0)
    for picture in (tmp_path / "datasets" / "images_crops.png", tmp_path / "out" / "sheet.png"):
        assert min(Image.open(picture).size) > 300 and np.asarray(Image.open(picture)).std() > 10
    assert not (tmp_path / "datasets" / "images").exists()


# ---- nothing ignored, nothing overwritten, nothing silent ----------------------------------------


def test_the_folder_that_one_stands_in_is_there_already(tmp_path):
    root = draw_folder(tmp_path / "images", classes=1, each=4)
    (tmp_path / "here").mkdir()
    for out in (".", ".."):
        done = call("data.py", root, "--out", out, cwd=tmp_path / "here")
        assert "is there already" in refused(done)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "images"]


def test_a_packed_set_and_its_sheet_are_replaced_by_nothing(tmp_path):
    root = draw_folder(tmp_path / "images")
    pack_images(root, tmp_path / "out", "--size", 16, check=0)
    before = (tmp_path / "out" / "train.safetensors").read_bytes()
    line = refused(pack_images(root, tmp_path / "out", "--size", 24))
    assert "is there already" in line and f"rm -r {tmp_path / 'out'}" in line
    assert (tmp_path / "out" / "train.safetensors").read_bytes() == before
    (root / "class0" / "illust0_0.png").write_bytes(b"no image")
    (root / "class0" / "illust0_1.png").write_bytes(b"no image")
    assert "more than 5 %" in refused(pack_images(root, tmp_path / "new"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "out"]  # nothing of what failed
    for path, picture in (
        (tmp_path / "out", tmp_path / "out" / "sheet.png"),
        (root, tmp_path / "datasets" / "images_crops.png"),
    ):
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(b"mine")
        line = refused(call("data.py", "--show", path, cwd=tmp_path))
        assert picture.name in line and picture.read_bytes() == b"mine"
        picture.unlink()
        call("data.py", "--show", path, cwd=tmp_path, check=0)
        assert picture.exists()


def test_a_folder_with_a_file_of_somebody_else_is_left_alone_and_an_empty_one_is_filled(tmp_path):
    root = draw_folder(tmp_path / "images", classes=2)
    theirs = tmp_path / "out" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    words = ("--size", 16, "--split", ".8,0,.2")
    assert "out is there already" in refused(pack_images(root, tmp_path / "out", *words))
    assert [p.read_text() for p in theirs.parent.iterdir()] == ["mine"]
    theirs.unlink()
    pack_images(root, tmp_path / "out", *words, check=0)
    assert sorted(p.stem for p in theirs.parent.iterdir()) == ["test", "train"]


def test_what_a_killed_packing_wrote_aside_is_removed_by_the_next(tmp_path):
    aside = tmp_path / ".out.tmp"
    aside.mkdir()
    (aside / "dev.safetensors").write_bytes(b"half")
    root = draw_folder(tmp_path / "images", classes=2)
    pack_images(root, tmp_path / "out", "--size", 16, "--split", ".8,0,.2", check=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "out"]
    assert sorted(p.stem for p in (tmp_path / "out").iterdir()) == ["test", "train"]


def test_a_size_that_memory_or_disk_can_not_hold_is_said_before_the_work(tmp_path, monkeypatch):
    root = draw_folder(tmp_path / "images", classes=1, each=4)
    monkeypatch.setattr(pack, "near_duplicates", lambda *_: pytest.fail("it went on"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**6))
    line = refused(pack_images(root, tmp_path / "out", "--size", 4096))
    assert "GB are free there" in line and int(line.split("--size ")[1].split()[0]) in range(
        270, 290
    )
    monkeypatch.setattr(pack.os, "sysconf", lambda name: 4096)  # 16 MB
    for source, largest in ((root, 724), ("toon", 256)):
        line = refused(
            call("data.py", source, "--size", 4096, "--out", tmp_path / "out", cwd=tmp_path)
        )
        assert "--size 4096 takes" in line and f"--size {largest} fits" in line
    assert not (tmp_path / "out").exists()


def test_reasons_of_broken_files_are_words_and_the_same_each_time(tmp_path, monkeypatch):
    root, prints = draw_folder(tmp_path / "images", classes=2, each=10), set()
    for i in range(3):
        (root / "class0" / f"illust{i}_0.png").write_bytes(b"no image")
    line = refused(pack_images(root, tmp_path / "a", "--size", 16))
    assert "3 of 20 images" in line and "more than 5 %" in line and "0x" not in line
    monkeypatch.setattr(pack, "MAX_BROKEN", 0.15)
    for name in "ab":
        done = pack_images(root, tmp_path / name, "--size", 16, check=0)
        assert "0x" not in done.stdout and "(cannot identify image file)" in done.stdout
        header = data.open_split(tmp_path / name, "train")["header"]
        assert "BytesIO" not in json.dumps(header)
        prints.add(json.dumps(header["skipped_first"]))
    assert len(prints) == 1  # an address would make each packing another data set
    for problem, words in (
        (OSError("cannot identify <_io.BytesIO object at 0x7f00>"), "cannot identify"),
        (ValueError(), "ValueError"),
        (ValueError("1 < 2 > 0"), "1 < 2 > 0"),
    ):
        assert decode.reason(problem) == words


def test_a_split_that_gets_no_picture_is_told(tmp_path):
    draw_folder(tmp_path / "images", classes=1, each=3)
    done = pack_images(
        tmp_path / "images", tmp_path / "out", "--size", 16, "--split", ".9,.05,.05", check=0
    )
    assert "no picture is left for val and test: 3 are too few" in done.stdout
    assert "pack it again with a val" in done.stdout


def next_command(done):
    """The command to learn from the set, of the last line, as a list of words."""
    line = done.stdout.splitlines()[-1]
    return shlex.split(line.partition(", or ")[2].partition(";")[0])


def test_the_next_line_is_right(tmp_path):
    folder = draw_folder(tmp_path / "my images", classes=1)
    done = call("data.py", folder / "class0", "--out", "a set", "--size", 16, cwd=tmp_path, check=0)
    assert next_command(done) == ["python", "pretrain.py", "--data", "a set"]
    assert (
        "python data.py --show 'a set'" in done.stdout
        and "need labels of two classes" in done.stdout
    )
    done = run_line(
        f"data.py {draw_folder(tmp_path / 'c')} --size 16 --split .8,0,.2", tmp_path, check=0
    )
    assert next_command(done) == [
        "python",
        "pretrain.py",
        "--data",
        "datasets/c",
        "--split",
        "test",
    ]
    assert "need labels" not in done.stdout
    done = call("data.py", "--show", "datasets/c", cwd=tmp_path, check=0)
    assert (
        "sheet.png written; next: python pretrain.py --data datasets/c --split test" in done.stdout
    )
    for path in folder.rglob("*.png"):
        image = Image.open(path).convert("RGBA")
        image.putpixel((0, 0), (0, 0, 0, 0))
        image.save(path)
    done = call("data.py", folder, "--out", "b", "--size", 16, cwd=tmp_path, check=0)
    assert next_command(done) == ["python", "pretrain.py", "--data", "b", "--mask", "fg_heavy"]
    assert "alpha: 12 of 12 images that were looked at have transparent pixels\n" in done.stdout


def test_a_folder_as_people_have_it(tmp_path):
    """Wrapped twice, a stray picture, names in Japanese, copies in and across classes, a broken
    file, some alpha.
    """
    rng, names = np.random.default_rng(0), ("初音ミク", "鏡音リン", "巡音ルカ")
    faces = [
        Image.fromarray(toon.draw(item, 64)["image"])
        for item in toon.plan(2400)[:: 2400 // 60][:60]
    ]
    root = tmp_path / "ダウンロード" / "faces (1)" / "faces"
    for i, face in enumerate(faces):
        path = root / unicodedata.normalize("NFD", names[i % 3]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i % 10 == 0:  # 6 of 60
            face.putalpha(Image.fromarray(np.uint8(255 * (rng.random((64, 64)) > 0.2))))
        face.save(path)
    faces[1].resize((50, 50)).save(root / names[1] / "copy.png")  # in its class
    faces[2].resize((50, 50)).save(root / names[0] / "copy.png")  # in another
    faces[4].resize((50, 50)).save(root / names[2] / "copy.png")
    (root / names[0] / "broken.png").write_bytes(b"no image")
    faces[7].save(tmp_path / "ダウンロード" / "cover.png")
    done = call("data.py", "ダウンロード", "--size", 32, "--dev", ".2", cwd=tmp_path, check=0)
    out = Path("datasets") / "ダウンロード"
    packed = {s: data.open_split(tmp_path / out, s) for s in ("train", "dev", "val", "test")}
    lines = done.stdout.splitlines()
    classes = "3 classes (初音ミク, 巡音ルカ, 鏡音リン)"
    assert lines[0] == f"read as -/-/class: {classes}; 1 pictures set aside (cover.png)"
    assert lines[1].startswith("alpha: ") and "too few for foreground masks" in lines[1]
    groups = "near-duplicates: 3 groups of 6 images; 2 hold several classes; 2 x "
    assert lines[2].startswith(groups)
    where = {
        key.split("/")[-2][:1] + key.split("/")[-1]: s
        for s, x in packed.items()
        for key in x["header"]["keys"]
    }
    told = {Path(line.split(":")[0]).stem: line for line in lines[3:7]}
    for split, x in packed.items():
        broken = "; skipped 1, the first: faces (1)/faces/初音ミク/broken.png (cannot identify image file)"
        assert told[split] == (
            f"{out}/{split}.safetensors: {len(x['images'])} images of 32 px, 3 classes"
            + broken * x["header"]["skipped"]
        )
        assert x["header"]["classes"] == sorted(names) and "fg" not in x
        assert x["header"]["notes"] == lines[:3]
    assert sum(len(x["images"]) for x in packed.values()) == 63 == len(where)
    assert sum(x["header"]["skipped"] for x in packed.values()) == 1
    assert where["鏡1.png"] == where["鏡copy.png"] and where["巡2.png"] == where["初copy.png"]
    assert lines[7:] == [
        f"{out} is packed; next: python data.py --show {shlex.quote(str(out))}, or "
        f"python pretrain.py --data {shlex.quote(str(out))}"
    ]


# ---- views and loader ----------------------------------------------------------------------------


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.25, 0.125, 0.5, 0.75), (0.1, 0.2, 0.61, 0.7)])
@pytest.mark.parametrize("side", [24, 64, 96])
def test_views_are_pillows_antialiased_linear_crops(box, side):
    smooth = np.asarray(Image.effect_noise((8, 8), 90).resize((64, 64), Image.Resampling.BICUBIC))
    image = np.stack([smooth, smooth[::-1], smooth.T], 2)
    top, left, height, width = (64 * x for x in box)
    truth = Image.fromarray(image).resize(
        (side, side), Image.Resampling.BILINEAR, (left, top, left + width, top + height)
    )
    for flip in (False, True):
        view = data.view_images(
            torch.from_numpy(image)[None], torch.tensor([box]), torch.tensor([flip]), side
        )[0].numpy()
        off = np.abs((view[:, ::-1] if flip else view).astype(int) - np.asarray(truth))
        assert (
            off.max() <= 3 and off.mean() < 0.35
        )  # Pillow reads up to half a pixel beyond the box; we never do


def test_a_map_follows_crop_and_flip():
    """A hot patch of the map and the bright square that it stands for end in the same place of the
    view.
    """
    draws = torch.Generator().manual_seed(0)
    boxes, flip = data.draw_boxes(64, draws, 0.4)
    image, heat = torch.zeros(64, 96, 96, 3, dtype=torch.uint8), torch.zeros(64, 12, 12)
    image[:, 40:48, 56:64], heat[:, 5, 7] = 255, 1.0
    bright = (
        data.view_images(image, boxes, flip, 96)
        .float()[..., 0]
        .view(64, 12, 8, 12, 8)
        .mean((2, 4))
        .flatten(1)
    )
    hot = data.view_maps(heat, boxes, flip, 12).flatten(1)
    seen = bright.amax(1) > 64  # the crop may have cut it off
    assert seen.sum() > 40 and flip[seen].any() and not flip[seen].all()
    y, x = (torch.stack([m.argmax(1) // 12, m.argmax(1) % 12]) for m in (bright, hot))
    assert ((y - x).abs()[:, seen] <= 1).all()
    centre = [(m[seen] * (torch.arange(144) % 12)).sum(1) / m[seen].sum(1) for m in (bright, hot)]
    assert (centre[0] - centre[1]).abs().max() < 0.75


def test_swapped_views_get_the_background_of_another_image():
    """Left half figure, right half background: only right halves change, and of the draws under 0.5."""
    view = (torch.arange(8, dtype=torch.uint8) * 20)[:, None, None, None].repeat(1, 32, 32, 3)
    fg = torch.zeros(8, 32, 32, 1)  # 4 images, 2 views of each
    fg[:, :, :16] = 1
    draws = torch.tensor([0.1, 0.1, 0.9, 0.9, 0.1, 0.9, 0.1, 0.1])
    mixed = data.swap_backgrounds(view, fg, draws, share=0.5, views=2)
    assert torch.equal(mixed[:, :, :16], view[:, :, :16])
    right = mixed[:, 0, -1, 0].tolist()
    assert [i for i in range(8) if right[i] != 20 * i] == [0, 1, 4, 6, 7]
    image = [x // 40 for x in right]  # that the background is from
    assert all(image[i] != i // 2 for i in (0, 1, 4, 6, 7))
    assert image[0] != image[1] and image[6] != image[7]  # two views, two backgrounds
    assert data.swap_backgrounds(view, fg, draws, share=0.0, views=2) is view


def test_boxes_lie_inside_and_show_at_least_the_least():
    boxes, flip = data.draw_boxes(5000, torch.Generator().manual_seed(0), 0.4)
    assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-6).all()
    area = boxes[:, 2] * boxes[:, 3]
    assert area.min() > 0.39 and 0.65 < area.mean() < 0.71 and 0.47 < flip.float().mean() < 0.53


def test_batches_cover_an_epoch_once_and_start_anywhere():
    images = np.arange(50, dtype=np.uint8).repeat(12).reshape(50, 2, 2, 3)
    order = data.epoch_order(50, seed=3, epoch=1)
    cpu = torch.device("cpu")
    whole = list(data.batches(images, order, 8, cpu))
    assert len(whole) == 6 and len(set(torch.cat([i for i, _ in whole]).tolist())) == 48
    assert all(torch.equal(batch[:, 0, 0, 0], index.to(torch.uint8)) for index, batch in whole)
    rest = list(data.batches(images, order, 8, cpu, start=4))
    assert [i.tolist() for i, _ in rest] == [i.tolist() for i, _ in whole[4:]]
    assert not torch.equal(order, data.epoch_order(50, seed=3, epoch=2))


def test_an_error_in_the_prefetch_thread_reaches_the_loop():
    def items():
        yield 1
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(data.prefetch(items()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_the_prefetch_thread_starts_no_threads_of_its_own():
    """A parallel operation there would bring a second team of OpenMP threads; two views are copied
    by the loop.
    """
    code = """if True:
        import os, numpy as np, torch, data
        torch.set_num_threads(2)
        torch.zeros(1 << 20).add_(1)  # the loop's own team
        count, images = lambda: len(os.listdir("/proc/self/task")), np.zeros((64, 128, 128, 3), np.uint8)
        before, during = count(), []
        for index, batch in data.batches(images, torch.arange(64), 16, torch.device("cpu"), times=2):
            assert len(index) == len(batch) == 32, (len(index), len(batch))
            during.append(count())
        print(before, max(during))
    """
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    before, during = map(int, out.split())
    assert during == before + 1, out  # the prefetch thread itself


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    """One epoch over a packed file of 3 GB, sparse on disk: anonymous memory stays where it was."""
    n, side = 65536, 128
    about = {"classes": ["a"], "keys": [""] * n, "size": side, "split": "train", "source": ""}
    about |= {"crop": "centre", "margin": 0.1}
    header = json.dumps(
        {
            "__metadata__": {"animask": json.dumps(about)},
            "images": {
                "dtype": "U8",
                "shape": [n, side, side, 3],
                "data_offsets": [0, n * side * side * 3],
            },
            "labels": {
                "dtype": "I64",
                "shape": [n],
                "data_offsets": [n * side * side * 3, n * (side * side * 3 + 8)],
            },
        }
    )
    header = header.encode().ljust(len(header) + 8 - len(header) % 8)
    with open(tmp_path / "train.safetensors", "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + n * (side * side * 3 + 8))
    code = """if True:
        import sys, torch, data
        def anonymous_mb():
            return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
        split = data.open_split(sys.argv[1], "train")
        order = data.epoch_order(len(split["images"]), 0, 0)
        before, most = anonymous_mb(), 0
        for i, (index, batch) in enumerate(data.batches(split["images"], order, 128, torch.device("cpu"))):
            most = max(most, anonymous_mb()) if i % 32 == 0 else most
        print(most - before)"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc, which only Linux has")
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100


def test_decoding_keeps_the_short_side_and_the_centre():
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, :20], picture[:, 20:60], picture[:, 60:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    image = decode.decode(file.getvalue(), 40, fg=False)["images"]
    assert image.shape == (40, 40, 3) and (image == (0, 255, 0)).all()


def test_the_demo_set_can_be_long_tailed(monkeypatch):
    monkeypatch.setattr(toon, "describe", lambda item: {"tags": ()})  # of 2,400 pictures: seconds
    records, *_ = pack.open_toon(16, 0, 1.2)
    sizes = sorted(Counter(r.label for r in records).values())
    assert sizes[0] >= 5 and sizes[-1] > 20 * sizes[0] and len(sizes) == 48


def test_any_set_can_be_long_tailed_in_train_alone(tmp_path):
    draw_folder(tmp_path / "images", classes=4, each=40)
    words = [
        "data.py",
        "images",
        "--size",
        16,
        "--split",
        ".5,.1,.4",
        "--dedupe",
        "off",
        "--group-by",
        "(.*)",
    ]
    for out, more in (("whole", []), ("tail", ["--tail", 1.2]), ("again", ["--tail", 1.2])):
        done = call(*words, *more, "--out", out, cwd=tmp_path, check=0)
    assert "left out: class sizes follow rank^-1.2" in done.stdout
    whole, tail, again = (
        {name: data.open_split(tmp_path / out, name) for name in ("train", "val", "test")}
        for out in ("whole", "tail", "again")
    )
    most = whole["train"]["labels"].bincount().max().item()
    assert sorted(tail["train"]["labels"].bincount().tolist()) == sorted(
        max(5, round(most * rank**-1.2)) for rank in (1, 2, 3, 4)
    )
    assert set(tail["train"]["header"]["keys"]) < set(whole["train"]["header"]["keys"])
    for name in ("val", "test"):
        assert tail[name]["header"]["keys"] == whole[name]["header"]["keys"]
    assert (
        data.fingerprint(tail["train"])
        == data.fingerprint(again["train"])
        != data.fingerprint(whole["train"])
    )


def test_the_demo_set_has_the_same_splits_however_it_is_asked_for(tmp_path, monkeypatch):
    shares, numbers = [], []
    monkeypatch.setattr(toon, "describe", lambda item: {"tags": ()})
    monkeypatch.setattr(pack, "near_duplicates", lambda *_: ([], []))
    monkeypatch.setattr(
        pack,
        "write_all",
        lambda *args: shares.append(args[-1]["split_shares"]) or numbers.append(len(args[1])),
    )
    monkeypatch.setattr(pack, "to_learn", lambda out: "")
    for words in ([], ["--drawings", "480"]):
        monkeypatch.setattr(
            sys, "argv", ["data.py", "toon", "--out", str(tmp_path / "packed"), *words]
        )
        pack.main()
    data.open_or_pack(tmp_path / "toon")
    assert shares == [pack.TOON_SHARES] * 3 and numbers == [2400, 480, 2400]


# ---- what is held apart for choices --------------------------------------------------------------


def test_what_is_held_apart_tears_no_group_and_empties_no_class():
    rng = np.random.default_rng(0)
    groups, labels = (
        np.append(rng.integers(0, 150, 600), 1000),
        np.append(rng.integers(0, 5, 600), 5),
    )
    held = data.hold_apart(groups, labels, 0.1)
    assert not set(groups[held]) & set(groups[~held]) and 50 <= held.sum() <= 60
    assert set(labels[~held]) == set(range(6))


def test_of_small_classes_two_pictures_stay():
    labels = np.concatenate([np.arange(20).repeat(2), np.full(300, 20)])
    for seed in range(5):
        held = data.hold_apart(np.arange(340), labels, 0.1, seed)
        assert np.bincount(labels[~held]).min() == 2 and held.sum() == 34


def test_dev_gets_illustrations_with_several_faces_too():
    """A third of the pictures are the only one of their illustration, the others stand in threes."""
    rows = [(f"c{i % 4}", f"one{i}") for i in range(200)] + [
        (f"c{i // 3 % 4}", f"three{i // 3}") for i in range(399)
    ]
    dealt = splits.assign_splits(["train"] * len(rows), rows, dict(train=1, val=0, test=0), 0.1, 0)
    dev = [group for (_, group), split in zip(rows, dealt, strict=True) if split == "dev"]
    assert 50 <= len(dev) <= 60 and 0.45 < sum(g.startswith("three") for g in dev) / len(dev) < 0.85
    train = {group for (_, group), split in zip(rows, dealt, strict=True) if split == "train"}
    assert not train & set(dev)


def test_half_of_a_given_val_becomes_test_in_whole_groups():
    given = ["train"] * 50 + ["val"] * 400
    groups = [f"illustration{i // 2}" for i in range(450)]
    dealt = splits.hold_out_test(given, groups, 0.5)
    assert dealt[:50] == given[:50] and 160 < dealt.count("test") < 240
    assert dealt[50::2] == dealt[51::2]
    assert splits.hold_out_test(given[50:], groups[50:], 0.5) == dealt[50:]  # its own rows decide
    assert splits.hold_out_test([*given, "test"], [*groups, "other"], 0.5) == [*given, "test"]


def test_the_fingerprint_of_a_set_is_that_of_its_pixels_too(tmp_path):
    """The same from another folder is the same set; one picture changed, and maps of the one do not
    fit the other.
    """
    digests = []
    for name, source in (("a", "images"), ("c", tmp_path / "c" / "images"), ("b", "images")):
        draw_folder(tmp_path / name / "images", seed=0)
        if name == "b":
            Image.new("RGB", (48, 40), "red").save(
                tmp_path / "b" / "images" / "class0" / "illust0_0.png"
            )
        out = tmp_path / name / "out"
        run_line(f"data.py {source} --out {out} --size 16 --dedupe off", tmp_path / name, check=0)
        digests.append(data.fingerprint(data.open_split(out, "train")))
    assert digests[0] == digests[1] != digests[2]
