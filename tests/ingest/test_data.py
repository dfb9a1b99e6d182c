"""Packing keeps every picture beside its label, in one split, whole or not at all; views and the loader."""

import io
import json
import os
import re
import shlex
import shutil
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import draw_folder, python, run_line, shared_file, some_view
from PIL import Image
from safetensors import safe_open

import data
from common import features, rows
from common.train import UserError
from ingest import decode, pack, sources, splits, tags, toon


def packed(cwd, line, out="out"):
    """Run `data.py LINE --out OUT --size 16` there -> what it said, and {split: open split}."""
    done = run_line(f"data.py {line} --out {out} --size 16", cwd, check=0)
    names = [path.stem for path in (cwd / out).glob("*.safetensors")]
    return done.stdout, {name: data.open_split(cwd / out, name) for name in sorted(names)}


@pytest.fixture
def images(tmp_path):
    """Three classes of 20 pictures; those of one illustration are near-duplicates of nothing."""
    return draw_folder(tmp_path / "images", classes=3, each=20)


def check_labels(root, sets):
    """Each picture has the mean colour of its file, and its folder is its class."""
    for split in sets.values():
        header = split["header"]
        for key, image, label in zip(header["keys"], split["images"], split["labels"], strict=True):
            assert key.startswith(header["classes"][label] + "/")
            truth = np.asarray(Image.open(root / key).convert("RGB"))
            assert np.abs(truth.mean((0, 1)) - image.mean((0, 1))).max() < 12


# ---- packing -------------------------------------------------------------------------------------


def test_a_folder_per_class_is_split_by_class_and_read_by_safetensors(tmp_path, images):
    _, sets = packed(tmp_path, "images")
    check_labels(images, sets)
    counts = {name: split["labels"].bincount().tolist() for name, split in sets.items()}
    assert counts == {"train": [14] * 3, "val": [2] * 3, "test": [4] * 3}
    with safe_open(tmp_path / "out/train.safetensors", "pt") as f:
        pixels, header = f.get_tensor("images"), json.loads(f.metadata()["animask"])
    assert pixels.dtype == torch.uint8 and pixels.shape == (42, 16, 16, 3)
    assert header == sets["train"]["header"]


def test_archives_pack_like_their_folder_and_leave_nothing_behind(tmp_path, images):
    """The same folder gives the same bytes, another seed another split."""
    for form in ("zip", "gztar"):
        shutil.make_archive(tmp_path / "images", form, tmp_path, "images")
    before = {path.name for path in tmp_path.iterdir()}
    contents, names = [], []
    for source in ("images", "images", "images.zip", "images.tar.gz", "images --seed 1"):
        _, sets = packed(tmp_path, f"{source} --dev .1", f"{len(names)}.out")
        names.append({name: split["header"]["keys"] for name, split in sets.items()})
        found = []
        for split in sets.values():
            pixels = [image.tobytes() for image in split["images"]]
            found += zip(split["labels"].tolist(), pixels, strict=True)
        contents.append(sorted(found))
    assert all(own == contents[0] for own in contents) and len(contents[0]) == 60
    assert names[0] != names[-1]
    for path in (tmp_path / "0.out").iterdir():
        assert path.read_bytes() == (tmp_path / "1.out" / path.name).read_bytes()
    assert {p.name for p in tmp_path.iterdir() if not p.name.endswith(".out")} == before


def test_alpha_becomes_the_figure_and_paper_shows_through(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[4:12, 4:12] = (200, 10, 10, 255)
    (tmp_path / "images").mkdir()
    for i in range(10):
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
    said, sets = packed(tmp_path, "images --dedupe off")
    split = sets["train"]
    assert split["fg"].shape == (7, 16, 16) and (split["fg"][0] == pixels[..., 3]).all()
    assert (split["images"][0, 8, 8] == (200, 10, 10)).all()
    assert (split["images"][0, 1, 1] == decode.PAPER).all()
    assert (split["labels"] == -1).all() and not data.has_labels(split)
    assert "alpha: 10 of 10" in said and "is the foreground" in said
    for i in range(6):
        Image.new("RGBA", (16, 16), (0, i, 0, 255)).save(tmp_path / f"images/{i}.png")
    (tmp_path / "few").mkdir()  # an empty folder is filled
    said, sets = packed(tmp_path, "images --dedupe off --split .8,0,.2", "few")
    assert sets.keys() == {"train", "test"} and "fg" not in sets["train"]
    assert "alpha: 4 of 10" in said and "too few" in said


def test_long_pictures_whose_centre_may_miss_the_head_are_told(tmp_path):
    """An emoji of several letters is a name of a class, too."""
    folder = tmp_path / "images" / "👩\u200d🎤 aoka"
    folder.mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (16, 40), (0, 40 * i, 0)).save(folder / f"{i}.png")
    said, sets = packed(tmp_path, "images --dedupe off --layout class")
    assert "crop: 6 of 6 images" in said and sets["train"]["header"]["classes"] == [folder.name]
    assert "crop:" not in packed(tmp_path, "images --dedupe off --crop figure", "whole")[0]


def test_the_boxes_of_a_list_are_what_the_figure_crop_keeps(tmp_path):
    lines = ["path,label,x1,y1,x2,y2"]
    for i in range(10):
        image = Image.effect_noise((48, 40), 50).convert("RGB")
        image.paste((200, 10, 10), (i, 8, i + 16, 24))
        image.save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,a,{i},8,{i + 16},24")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    _, sets = packed(tmp_path, "list.csv --crop figure:margin=0 --dedupe off --split 1,0,0")
    assert (sets["train"]["images"] == (200, 10, 10)).all()
    assert (sets["train"]["header"]["crop"], sets["train"]["header"]["margin"]) == ("figure", 0)


def test_broken_files_and_bombs_are_skipped_counted_and_named(tmp_path, monkeypatch):
    """What comes after a gap stands beside its own label."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # twice as many are a bomb
    root = draw_folder(tmp_path / "images", classes=3, each=40)
    bomb = io.BytesIO()
    Image.new("1", (1500, 1500)).save(bomb, "PNG")
    whole = (root / "class0/illust0_0.png").read_bytes()
    broken = {"class0/illust0_0.png": bomb.getvalue(), "class1/illust1_0.png": whole[:200]}
    broken |= {"class2/empty.png": b"", "class2/text.png": b"no image"}
    for name, content in broken.items():
        (root / name).write_bytes(content)
    Image.new("L", (1300, 1000)).save(root / "class0/scan.jpg")  # large, and no bomb
    said, sets = packed(tmp_path, "images")
    headers = [split["header"] for split in sets.values()]
    skipped = dict(sum((header["skipped_first"] for header in headers), []))
    assert skipped.keys() == broken.keys() and sum(header["skipped"] for header in headers) == 4
    assert "decompression bomb" in skipped["class0/illust0_0.png"]
    assert skipped["class2/text.png"] == "cannot identify image file"  # without an address
    assert all(f"{name} (" in said for name in broken)
    assert sum(len(split["images"]) for split in sets.values()) == 119
    check_labels(root, sets)


def cut_off(file):
    """A JPEG without the second half of its pixels, under an end marker."""
    content = file.read_bytes()
    scan = content.rfind(b"\xff\xda")
    file.write_bytes(content[: (scan + len(content)) // 2] + b"\xff\xd9")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_whose_half_is_missing_is_skipped_and_a_gray_border_is_not(tmp_path, mode):
    noise = Image.effect_noise((48, 64), 90).convert(mode)
    gray = {"RGB": (128,) * 3, "L": 128, "CMYK": (0, 0, 0, 127)}[mode]
    for i in range(30):
        picture = Image.new(mode, (64, 96), gray)
        picture.paste(noise.rotate(7 * i), (0, 0))
        (tmp_path / "images").mkdir(exist_ok=True)
        picture.save(tmp_path / f"images/{i:02}.jpg", quality=95)
    cut = tmp_path / "images/07.jpg"
    noise.resize((64, 96)).save(cut, quality=95)
    cut_off(cut)
    said, _ = packed(tmp_path, "images --dedupe off")
    assert said.count("skipped 1") == 1 and "07.jpg (the end of the file is missing)" in said


def test_the_first_frame_of_an_animation_is_read_and_no_picture_for_old_programs(tmp_path):
    (tmp_path / "images").mkdir()
    red, blue = (Image.new("RGBA", (16, 16), name) for name in ("red", "blue"))
    for name, first in (("with", True), ("without", False)):
        for i in range(5):
            frames = [red, blue] if first else [blue]
            start = Image.new("RGBA", (16, 16), (0, 9 * i, 0, 9)) if first else red
            how = {"save_all": True, "append_images": frames, "default_image": first}
            start.save(tmp_path / f"images/{name}{i}.png", **how)
    red.save(tmp_path / "images/x.gif", save_all=True, append_images=[blue])
    said, sets = packed(tmp_path, "images --dedupe off --split 1,0,0")
    assert (sets["train"]["images"] == (255, 0, 0)).all() and "alpha" not in said


WARNS = (
    b"II*\0\x08\0\0\0"  # EXIF: where the fields begin, which then are missing, cut off, or far away
)
WARNS = [
    WARNS + rest for rest in (b"", b"\x05\0\x12", b"\x01\0\x0f\x01\x02\0\xff\0\0\0\x00\x10\0\0")
]


@pytest.mark.parametrize("exif", WARNS)
@pytest.mark.parametrize("flags", ["", " --dedupe off"])
def test_what_pillow_warns_of_is_named_once(tmp_path, exif, flags):
    root = draw_folder(tmp_path / "images", classes=2, each=8)
    for name in ("class0/w", "class1/x"):
        picture = Image.effect_noise((40, 40), 80).convert("RGB")
        picture.save(root / f"{name}.jpg", exif=b"Exif\0\0" + exif)
    said = run_line(f"data.py images --out out --size 16{flags}", tmp_path, check=0).stderr
    lines = re.findall(r"(\d) pictures make Pillow warn, the first: class(?:0/w|1/x).jpg \(", said)
    assert sum(map(int, lines)) == 2 and "Warning" not in said
    assert len(lines) == 1 or flags  # a line for all, or for each split


def test_a_folder_with_a_slash_behind_it_is_the_same_folder(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images/", "images/", "images", "./images", str(images)):
        assert data.open_or_pack(name, 16).as_posix() == "datasets/images"
    draw_folder(tmp_path / "other/images")
    with pytest.raises(UserError, match="packed from another place"):
        data.open_or_pack("other/images", 16)


CHANGES = {  # of a list of 36 pictures: whose label, or whose pixels
    "nothing": None,
    "a label of train": ("label", 0),
    "a label of val": ("label", 1),
    "a label of dev": ("label", 2),
    "pixels of train": ("pixels", 0),
}


def test_a_set_of_other_labels_or_pixels_has_another_digest(tmp_path):
    """Keys stay, as in a list. The same from another folder is the same set."""
    digests = []
    for number, change in enumerate([*CHANGES.values(), None]):
        root = tmp_path / str(number)
        lines = ["path,label,split"]
        files = sorted(draw_folder(root / "images", classes=3, each=12).rglob("*.png"))
        for i, file in enumerate(files):
            label = "class2" if change == ("label", i) else file.parent.name
            if change == ("pixels", i):
                Image.new("RGB", (48, 40), "red").save(file)
            lines.append(f"{file.relative_to(root)},{label},{('train', 'val', 'dev')[i % 3]}")
        (root / "list.csv").write_text("\n".join(lines))
        _, sets = packed(root, "list.csv --dedupe off")
        digests.append((data.digest(root / "out"), data.fingerprint(sets["train"])))
    assert digests[0] == digests[-1]
    assert len({digest for digest, _ in digests}) == len(CHANGES)
    assert len({train for _, train in digests}) == 3  # a label, and pixels of train


@pytest.mark.slow
def test_the_shared_faces_pack_whole(tmp_path):
    faces = shared_file("faces20.zip")
    _, sets = packed(tmp_path, f"{faces} --group-by ^[^_]+ --dev .1 --test .5 --dedupe off")
    sizes = {name: len(split["images"]) for name, split in sets.items()}
    assert sizes["val"] + sizes["test"] == 1749 and sizes["train"] + sizes["dev"] == 8076
    groups = [set(split["header"]["groups"]) for split in sets.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert len(sets["train"]["header"]["classes"]) == 20


# ---- the demo set --------------------------------------------------------------------------------


def test_the_demo_set_records_tags_and_strata(monkeypatch):
    """Of its tags a picture gets half, and one in ten gets none, as people file pictures."""
    plan = toon.plan
    threads = ThreadPoolExecutor(1)  # a process of its own would import torch again
    monkeypatch.setattr(pack, "ProcessPoolExecutor", lambda *_, **__: threads)
    monkeypatch.setattr(toon, "plan", lambda **more: plan(**more | {"n": 480}))
    source = pack.open_toon(pack.parse_flags(["toon"]), 32)
    records = [r._replace(split="train") for r in source.records]
    words, _ = tags.vocabulary(records)
    dims, stream = tags.add_planes(words, records, source.dims, source.stream, thin=True)
    for record, row in stream(records[::160]):
        truth = toon.draw(record.place, 32)
        have = {plane: [words[i] for i in row[plane] if i >= 0] for plane in ("tags", "all_tags")}
        assert set(have["all_tags"]) == set(truth["tags"]) & set(words)
        assert set(have["tags"]) == set(tags.thinned(record)) & set(words) <= set(have["all_tags"])
        strata = zip(toon.STRATA.values(), row["style"], strict=True)
        assert [values[i] for values, i in strata] == list(truth["style"].values())
        assert {plane: row[plane].shape for plane in dims} == dims
    kept = [len(tags.thinned(r)) / len(r.tags) for r in records]
    assert 0.06 < np.mean(np.equal(kept, 0)) < 0.14 and 0.42 < np.mean(kept) < 0.48


def test_the_demo_set_has_the_same_splits_however_it_is_asked_for(tmp_path, monkeypatch):
    found = []

    def noted(out, records, dims, stream, about, copies):
        found.append((about["split_shares"], [r.label for r in records]))

    monkeypatch.setattr(toon, "describe", lambda item: {"tags": ()})  # of 2,400 pictures: seconds
    monkeypatch.setattr(pack, "write_all", noted)
    monkeypatch.setattr(pack, "to_learn", lambda out: "")
    for words in ("", " --drawings 480", " --tail 1.2", " --characters 60"):
        run_line(f"data.py toon --out {tmp_path}/packed{words}", tmp_path, check=0)
    data.open_or_pack(tmp_path / "toon")
    assert {shares for shares, _ in found} == {pack.TOON_SHARES}
    assert [len(labels) for _, labels in found] == [2400, 480, 2400, 2400, 2400]
    assert [len({*labels}) for _, labels in found] == [48, 48, 48, 60, 48]
    assert max(Counter(found[2][1]).values()) > 400  # a long tail, as of toon.plan


# ---- nothing overwritten, nothing silent ---------------------------------------------------------


NEXT = {  # flags: the command that comes next, and words of what is said
    "images --split .8,0,.2": (
        "python -m apps.learn OUT",
        "test 12",
    ),
    "images --split 1,0,0": (
        "python -m apps.learn OUT",
        "train 60, 3 classes",
    ),
    "images/class0": ("python pretrain.py --data OUT", "finetune_lora.py can't learn from it"),
    "clear --split .8,0,.2 --dedupe off": (
        "python pretrain.py --data OUT --mask fg_heavy --split test",
        "finetune_lora.py can't learn from it",
    ),
    "frames": ("python -m apps.segment weights/toon --data OUT", "mixed"),
    "images --split 0,0,1": (
        "python -m apps.unknown RUN --data OUT --split test",
        "no train: stages can measure",
    ),
    "few --split .9,.05,.05": (
        "pack it again with a val, such as by --split",
        "no picture is left for val and test: 3 are too few",
    ),
}


def test_a_class_that_nobody_can_learn_is_said():
    a, b = (sources.Record(f"{who}.png", None, who, split="train") for who in "ab")
    assert pack.unlearned([a, a, b, b, b._replace(label=None, split="val")]) == []
    for few in ([b._replace(split="val")] * 3, [b]):
        (line,) = pack.unlearned([a, a, *few])
        assert line.startswith("1 classes have fewer than two pictures in train, the first: b")


def test_classes_that_are_spelled_alike_are_said():
    names = ("Miku", "miku", "hatsune miku", "Hatsune_Miku", "rin", "rin2", "kagamine rin")
    (line,) = pack.spelled_alike([sources.Record(name, None, name) for name in names])
    assert "Hatsune_Miku and hatsune miku" in line and "Miku and miku" in line
    assert "rin" not in line and pack.spelled_alike([sources.Record("a", None, None)] * 2) == []


@pytest.mark.parametrize("line", NEXT)
def test_the_next_line_is_right_and_for_a_shell(tmp_path, images, no_pictures, line):
    command, words = NEXT[line]
    quoted = shlex.quote("it's")
    command = command.replace("OUT", quoted)
    draw_folder(tmp_path / "few", classes=3, each=1)
    for i, kind in enumerate(("drawn", "photographed", "mixed")):
        shutil.copytree(images / f"class{i}", tmp_path / "frames" / kind)
    (tmp_path / "clear").mkdir()
    for i in range(20):  # their alpha is a foreground
        Image.new("RGBA", (16, 16), (9 * i, 0, 0, i)).save(tmp_path / f"clear/{i}.png")
    said, _ = packed(tmp_path, line, "it's")
    shown = run_line("data.py --show it's", tmp_path, check=0).stdout
    assert f"next: python data.py --show {quoted}, or {command}" in said
    assert f"next: {command}" in shown
    assert words in said + shown and ("can't learn" in said) == ("can't learn" in words)


# ---- who goes where ------------------------------------------------------------------------------


def records_of(seed, splits_given=(None,), n=120):
    """Random records of three classes in groups of one to five, some near-duplicates -> and pairs."""
    rng, records = np.random.default_rng(seed), []
    for i in range(n):
        label, group = "abc"[rng.integers(3)], f"i{rng.integers(n // 3)}"
        split = splits_given[rng.integers(len(splits_given))]
        records.append(sources.Record(f"{group}_{i}.png", i, label, split))
    pairs = [tuple(sorted(map(int, rng.choice(n, 2, replace=False)))) for _ in range(10)]
    return records, pairs


@pytest.mark.parametrize("seed", range(4))
def test_groups_and_copies_stay_together_and_every_class_gets_its_share(seed):
    records, pairs = records_of(seed)
    grouped, notes = splits.without_copies(records, "^[^_]+", pairs, "group")
    assert [r.key for r in grouped] == [r.key for r in records] and not notes
    for i, j in pairs:
        assert grouped[i].group == grouped[j].group
    shares = {"train": 0.6, "val": 0.2, "test": 0.2}
    rows = [(r.label, r.group) for r in grouped]
    dealt = splits.assign_splits([None] * len(rows), rows, shares, 0.1, seed)
    found = {}
    for r, split in zip(grouped, dealt, strict=True):
        found.setdefault(r.key.split("_")[0], set()).add(split)
        found.setdefault(r.group, set()).add(split)
    assert all(len(some) == 1 for some in found.values())
    for label in "abc":
        own = Counter(s for s, r in zip(dealt, grouped, strict=True) if r.label == label)
        for split, share in {"val": 0.2, "test": 0.2}.items():
            assert abs(own[split] / own.total() - share) < 0.12, (label, own)
    assert 0 < dealt.count("dev") <= 0.1 * (dealt.count("train") + dealt.count("dev"))


@pytest.mark.parametrize("dedupe", ["group", "drop"])
def test_no_copy_of_a_later_split_is_left(dedupe):
    """train keeps all of its pictures, val none that train has, test none that either has."""
    order = ("train", "dev", "val", "test")
    for seed in range(4):
        records, pairs = records_of(seed, order)
        left, _ = splits.without_copies(records, None, pairs, dedupe)
        kept = {r.key for r in left}
        assert dedupe == "group" or all(r.group == r.key for r in left)
        roots = splits.duplicates.join(len(records), pairs)
        for root in set(roots):
            own = [r for r, other in zip(records, roots, strict=True) if other == root]
            first = min((r.split for r in own), key=order.index)
            stay = [r.key for r in own if r.split == first]
            assert kept & {r.key for r in own} == set(stay[:1] if dedupe == "drop" else stay)


def test_pictures_without_a_split_beside_given_ones_are_train():
    rows, shares = [(None, str(i)) for i in range(40)], {"train": 0.5, "val": 0.25, "test": 0.25}
    dealt = splits.assign_splits(["val"] * 10 + [None] * 30, rows, shares, 0, 0)
    assert dealt == ["val"] * 10 + ["train"] * 30
    dealt = splits.assign_splits(["val"] * 10 + [None] * 30, rows, shares, 0.2, 0)
    assert Counter(dealt) == {"val": 10, "train": 24, "dev": 6}
    given = ["dev", "val", *["train"] * 38]
    assert splits.assign_splits(given, rows, shares, 0.5, 0) == given
    assert splits.assign_splits(["val"] * 40, rows, shares, 0.5, 0) == ["val"] * 40
    dealt = splits.assign_splits([None] * 40, rows, shares, 0, 0)
    assert Counter(dealt) == {"train": 20, "val": 10, "test": 10}
    given = ["train", "test"] * 20  # a val is taken out of train
    dealt = splits.assign_splits(given, rows, shares, 0, 0)
    assert Counter(dealt) == {"train": 15, "val": 5, "test": 20} and dealt[1::2] == ["test"] * 20


def test_the_name_of_a_group_is_the_pattern_else_the_source_else_the_key():
    given = {"a_1": "7", "b": "7", "c": None}
    records = [sources.Record(f"x/{name}.png", name, group=g) for name, g in given.items()]
    assert [r.group for r in splits.join_groups(records, None, [])] == ["7", "7", "x/c.png"]
    assert [r.group for r in splits.join_groups(records, "^(.)_", [])] == ["a", "7", "x/c.png"]
    assert [r.group for r in splits.join_groups(records, "^._", [(0, 2)])] == ["a_", "7", "a_"]


def test_half_of_a_given_val_becomes_test_in_whole_groups():
    given = ["train"] * 50 + ["val"] * 400
    groups = [f"illustration{i // 2}" for i in range(450)]
    dealt = splits.hold_out_test(given, groups, 0.5)
    assert dealt[:50] == given[:50] and 160 < dealt.count("test") < 240
    assert dealt[50::2] == dealt[51::2]
    assert splits.hold_out_test(given[50:], groups[50:], 0.5) == dealt[50:]  # its own rows decide
    assert 60 < splits.hold_out_test(given, groups, 0.2).count("test") < 100
    assert splits.hold_out_test([*given, "test"], [*groups, "other"], 0.5) == [*given, "test"]


def test_classes_of_the_least_size_stay_and_pictures_without_a_class_go():
    records = [sources.Record(str(i), "", label) for i, label in enumerate("aaabb")]
    records.append(sources.Record("x", ""))
    kept, (note,) = splits.large_enough(records, 3)
    assert kept == records[:3] and note.startswith("3 images left out: 1 classes")
    assert splits.large_enough(records, 0) == (records, [])
    assert splits.large_enough(kept, 3) == (kept, [])
    with pytest.raises(UserError, match="the largest class has 3 images"):
        splits.large_enough(records, 4)
    nobody = sources.Record("y", "", "unknown")
    assert splits.large_enough([*records, nobody], 3)[0] == [*kept, nobody]


def test_a_long_tail_keeps_the_largest_class_and_the_other_splits_whole():
    records = []
    for label, n in {"a": 9, "b": 40, "c": 30, None: 8}.items():
        records += [sources.Record(f"{label}{i}", "", label, "train") for i in range(n)]
    records += [sources.Record(f"test{i}", "", "a", "test") for i in range(9)]
    kept, (note,) = splits.long_tailed(records, 1.0)
    sizes = Counter((r.split, r.label) for r in kept)
    of_train = {("train", "b"): 40, ("train", "c"): 20, ("train", "a"): 9, ("train", None): 8}
    assert sizes == of_train | {("test", "a"): 9} and note.startswith("10 training images")
    assert {r.key for r in splits.long_tailed(records[::-1], 1.0)[0]} == {r.key for r in kept}
    steep = Counter(r.label for r in splits.long_tailed(records[:79], 5)[0])
    assert steep == {"b": 40, "c": 5, "a": 5}
    assert splits.long_tailed(records[:9], 5) == (records[:9], [])


def test_small_classes_are_left_out_and_train_becomes_long_tailed(tmp_path):
    draw_folder(tmp_path / "images", classes=4, each=40)
    for path in sorted((tmp_path / "images/class3").iterdir())[5:]:
        path.unlink()
    line = "images --split .5,.1,.4 --dedupe off --min-per-class 6 --tail 1.2"
    _, sets = packed(tmp_path, line)
    sizes = {name: split["labels"].bincount().tolist() for name, split in sets.items()}
    assert sizes == {"train": [20, 9, 5], "val": [4, 4, 4], "test": [16, 16, 16]}


def test_what_is_held_apart_tears_no_group_and_empties_no_class():
    """200 groups of one picture and 133 of three: both kinds are held apart. One class is alone."""
    groups = np.concatenate([np.arange(200), np.arange(200, 333).repeat(3), [1000]])
    labels = np.append(groups[:-1] % 4, 5)
    held = features.hold_apart(groups, labels, 0.1)
    assert not set(groups[held]) & set(groups[~held]) and 50 <= held.sum() <= 60
    assert set(labels[~held]) == {0, 1, 2, 3, 5}
    assert 0.45 < (groups[held] >= 200).mean() < 0.85
    labels = np.concatenate([np.arange(20).repeat(2), np.full(300, 20)])
    for seed in range(5):  # of small classes two pictures stay
        held = features.hold_apart(np.arange(340), labels, 0.1, seed)
        assert np.bincount(labels[~held]).min() == 2 and held.sum() == 34


# ---- views and loader ----------------------------------------------------------------------------


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.25, 0.125, 0.5, 0.75), (0.1, 0.2, 0.61, 0.7)])
@pytest.mark.parametrize("side", [24, 64, 96])
def test_views_are_pillows_antialiased_linear_crops(box, side):
    smooth = np.asarray(Image.effect_noise((8, 8), 90).resize((64, 64), Image.Resampling.BICUBIC))
    image = np.stack([smooth, smooth[::-1], smooth.T], 2)
    top, left, height, width = (64 * x for x in box)
    area = (left, top, left + width, top + height)
    truth = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, area)
    for flip in (False, True):
        where = torch.tensor([box]), torch.tensor([flip])
        view = data.view_images(torch.from_numpy(image)[None], *where, side)[0].numpy()
        off = np.abs((view[:, ::-1] if flip else view).astype(int) - np.asarray(truth))
        # Pillow reads up to half a pixel beyond the box; we never do
        assert off.max() <= 3 and off.mean() < 0.35


EDGES = [(0, 0, 1, 1), (0, 0, 0.3, 0.6), (0.7, 0.4, 0.3, 0.6), (0.7, 0, 0.3, 1), (0, 0.9, 1, 0.1)]


@pytest.mark.parametrize(("S", "side"), [(33, 33), (16, 97), (96, 128)])
def test_a_view_is_the_product_with_two_matrices_rounded_and_a_map_is_not_rounded(S, side):
    draws = torch.Generator().manual_seed(0)
    boxes = torch.cat([torch.tensor(EDGES), data.draw_boxes(27, draws, 0.05)[0]]).repeat(2, 1)
    flip = torch.arange(64) < 32
    images = torch.randint(0, 256, (64, S, S, 3), dtype=torch.uint8, generator=draws)
    Wy, Wx = data.view_matrices(boxes, flip, S, side)
    truth = torch.einsum("bij,bjkc,bkl->bilc", Wy, images.float(), Wx)
    view = data.view_images(images, boxes, flip, side)
    assert view.is_contiguous() and (view - truth).abs().max() < 0.52  # the same, and rounded
    maps = data.view_maps(images[..., 0], boxes, flip, side)
    assert (maps - truth[..., 0]).abs().max() < 0.02
    whole = data.view_images(images, *data.full_boxes(64), S)
    assert torch.equal(whole, images)


def test_views_are_one_graph_that_waits_for_no_number():
    """torch.compile without a break: nothing in it asks for a value of a box."""
    images, side = some_view(4), 48
    drawn = data.draw_boxes(4, torch.Generator().manual_seed(0), 0.4)
    for cut, pixels in ((data.view_images, images), (data.view_maps, images[..., 0])):
        graph = torch.compile(cut, fullgraph=True, dynamic=False, backend="aot_eager")
        near = (graph(pixels, *drawn, side).float() - cut(pixels, *drawn, side)).abs()
        assert near.max() <= 1 and near.mean() < 0.01


def test_a_map_follows_crop_and_flip():
    """A hot patch of the map and the bright square that it stands for end in the same place."""
    boxes, flip = data.draw_boxes(64, torch.Generator().manual_seed(0), 0.4)
    image, heat = torch.zeros(64, 96, 96, 3, dtype=torch.uint8), torch.zeros(64, 12, 12)
    image[:, 40:48, 56:64], heat[:, 5, 7] = 255, 1.0
    view = data.view_images(image, boxes, flip, 96).float()[..., 0]
    bright = view.view(64, 12, 8, 12, 8).mean((2, 4)).flatten(1)
    hot = data.view_maps(heat, boxes, flip, 12).flatten(1)
    seen = bright.amax(1) > 64  # the crop may have cut it off
    assert seen.sum() > 40 and flip[seen].any() and not flip[seen].all()
    y, x = (torch.stack([m.argmax(1) // 12, m.argmax(1) % 12]) for m in (bright, hot))
    assert ((y - x).abs()[:, seen] <= 1).all()
    centre = [(m[seen] * (torch.arange(144) % 12)).sum(1) / m[seen].sum(1) for m in (bright, hot)]
    assert (centre[0] - centre[1]).abs().max() < 0.75


def test_swapped_views_get_the_background_of_another_image():
    """Left half figure, right half background: only right halves change, each to the one before."""
    view = (torch.arange(8, dtype=torch.uint8) * 20)[:, None, None, None].repeat(1, 32, 32, 3)
    fg = torch.zeros(8, 32, 32, 1)
    fg[:, :, :16] = 1
    mixed = data.swap_backgrounds(view, fg)
    assert torch.equal(mixed[:, :, :16], view[:, :, :16])
    assert torch.equal(mixed[:, :, 16:], view[:, :, 16:].roll(1, 0))


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


def test_what_goes_to_metal_is_sent_by_the_thread_that_computes(monkeypatch):
    senders = []

    def send(x, device):
        if device.type == "mps":
            senders.append(threading.current_thread())
        return x

    monkeypatch.setattr(data, "send", send)
    images = np.zeros((6, 2, 2, 3), np.uint8)
    assert len(list(data.batches(images, torch.arange(6), 2, torch.device("mps")))) == 3
    assert senders == [threading.main_thread()] * 3


MEMORY = """
import sys, torch, data
def anonymous_mb():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024
images = data.open_split(sys.argv[1], "train")["images"]
order, before, most = data.epoch_order(len(images), 0, 0), anonymous_mb(), 0
for i, (index, batch) in enumerate(data.batches(images, order, 128, torch.device("cpu"))):
    most = max(most, anonymous_mb()) if i % 32 == 0 else most
print(most - before)
"""


linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux_only
def test_the_prefetch_thread_starts_no_threads_of_its_own():
    """A parallel operation there would bring a second team of OpenMP threads."""
    few = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.zeros(1 << 20).add_(1)  # the loop's own team
    images = np.zeros((64, 128, 128, 3), np.uint8)
    before, during = len(os.listdir("/proc/self/task")), []
    for _ in data.batches(images, torch.arange(64), 16, torch.device("cpu")):
        during.append(len(os.listdir("/proc/self/task")))
    torch.set_num_threads(few)
    assert len(during) == 4 and max(during) - before == 1  # the prefetch thread itself


@linux_only
@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    """One epoch over a packed file of 3 GB, sparse on disk: anonymous memory stays where it was."""
    n, side = 65536, 128
    about = {"classes": ["a"], "keys": [""] * n, "size": side, "split": "train", "source": ""}
    head = rows.file_head({"images": ("U8", (side, side, 3)), "labels": ("I64", ())}, n, about)
    head = head.ljust(len(head) + 8 - len(head) % 8)
    with open(tmp_path / "train.safetensors", "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        f.truncate(8 + len(head) + n * (side * side * 3 + 8))
    assert float(python("-c", MEMORY, tmp_path)) < 100
