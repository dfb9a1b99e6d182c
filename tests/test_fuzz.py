"""Some four hundred bad calls of every stage: no traceback, nothing lost, nothing ignored, one line that says why.

    python -m pytest -m slow tests/test_fuzz.py        # all of them; without -m slow thirty

A call is made in a small scratch folder, which is put back afterwards. Each has to end with status
0, or with status 2 and one line on stderr that begins with "error: "; no file that was there may
change, unless the call goes on with it (--resume); nothing temporary may stay. A call that breaks
this is printed as a command line.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import re
import shlex
import shutil
import tempfile
import traceback
from collections import namedtuple
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from conftest import ROOT, call, draw_folder

import model
from ingest import pack, toon

# stage; what is done to files before (path, how); commands, of which the last is judged; must it be
# refused, and by which flags' names?
Case = namedtuple("Case", "kind stage spoil commands refused", defaults=(False,))
SEED, CPU = 0, ["--device", "cpu", "--dtype", "fp32"]
SMALL = [
    "--data",
    "datasets/tiny",
    "--model",
    "nano:image_size=32,decoder_dim=32",
    "--batch-size",
    16,
    "--epochs",
    1,
    *CPU,
]
TAGS = ["--data", "datasets/tiny", "--epochs", 2, "--batch-size", 16, *CPU]
TINY_TUNE = ["--data", "datasets/tiny", "--epochs", 1, "--batch-size", 16, *CPU]

# A call of each stage that works; every bad one is made from it
GOOD = {
    "data.py": ["pictures", "--out", "datasets/new", "--size", 32],
    "maps.py": [
        "--data",
        "datasets/tiny",
        "--map",
        "saliency",
        "--out",
        "maps/new",
        "--device",
        "cpu",
    ],
    "pretrain.py": [*SMALL, "--out", "runs/new"],
    "probe.py": ["runs/nano", "--data", "datasets/tiny", "--headline", *CPU],
    "finetune_lora.py": ["runs/nano", *TINY_TUNE, "--out", "runs/new", "--method", "linear"],
    "recognize.py": ["runs/lora", "pictures/class0/illust0_0.png", *CPU],
    "tags.py": ["runs/nano", *TAGS, "--out", "runs/new"],
    "export.py": ["runs/nano", "--to", "timm", "--out", "exports/timm.safetensors"],
    "ingest.toon": ["--rows", 1, "--columns", 1, "--size", 32, "--out", "new.png"],
    "experiments.run": ["mine", "--arms", "block", "--data", "datasets/tiny", "--dry"],
    "experiments.report": ["results/study/mine-tiny"],
    "experiments.stress": [
        "runs/nano",
        "--data",
        "datasets/tiny",
        "--only",
        "cutout",
        "--images",
        8,
        *CPU,
    ],
    "experiments.map_quality": ["runs/nano", "--data", "datasets/tiny"],
}
# Other calls that work, whose inputs are spoiled, too
MORE = [
    ("pretrain.py", ["--resume", "runs/nano"]),
    ("pretrain.py", [*SMALL, "--out", "runs/new", "--mask", "fg_heavy", "--maps", "maps/tiny"]),
    ("pretrain.py", [*SMALL, "--out", "runs/new", "--mask", "attn_high", "--teacher", "runs/nano"]),
    ("pretrain.py", [*SMALL, "--out", "runs/new", "--init", "runs/nano"]),
    (
        "finetune_lora.py",
        ["--resume", "runs/lora", "--split", "test"],
    ),
    ("recognize.py", ["runs/lora", "--verify", "--data", "datasets/tiny", *CPU]),
    ("recognize.py", ["runs/lora", "--enrol", "newcomer", "pictures/class0", *CPU]),
    ("tags.py", ["runs/tags", "pictures/class0", *CPU]),
    ("export.py", ["runs/lora", "--to", "merged", "--out", "exports/merged.safetensors"]),
    ("data.py", ["list.csv", "--out", "datasets/new", "--size", 32]),
    (
        "data.py",
        [
            "pictures",
            "--out",
            "datasets/new",
            "--size",
            32,
            "--crop",
            "figure:margin=0.3",
        ],
    ),
    (
        "maps.py",
        [
            "--data",
            "datasets/tiny",
            "--map",
            "attn",
            "--run",
            "runs/nano",
            "--out",
            "maps/new",
            "--device",
            "cpu",
        ],
    ),
]
# What each of them reads
INPUTS = {
    "data.py": ["pictures/class0/illust0_0.png", "list.csv", "pictures"],
    "maps.py": ["datasets/tiny/train.safetensors", "runs/nano/model.safetensors"],
    "pretrain.py": [
        "datasets/tiny/train.safetensors",
        "datasets/tiny/val.safetensors",
        "runs/nano/state.pt",
        "runs/nano/log.jsonl",
        "runs/nano/model.safetensors",
        "maps/tiny/saliency.safetensors",
    ],
    "probe.py": [
        "datasets/tiny/val.safetensors",
        "datasets/tiny/dev.safetensors",
        "runs/nano/model.safetensors",
        "runs/nano/log.jsonl",
    ],
    "finetune_lora.py": [
        "datasets/tiny/train.safetensors",
        "datasets/tiny/dev.safetensors",
        "runs/lora/state.pt",
        "runs/lora/log.jsonl",
        "runs/lora/metrics.json",
        "runs/nano/model.safetensors",
    ],
    "recognize.py": [
        "runs/lora/head.safetensors",
        "runs/lora/gallery.safetensors",
        "runs/lora/adapter_config.json",
        "runs/lora/adapter_model.safetensors",
        "runs/nano/model.safetensors",
        "pictures/class0/illust0_0.png",
        "datasets/tiny/val.safetensors",
    ],
    "tags.py": [
        "runs/nano/model.safetensors",
        "runs/tags/model.safetensors",
        "datasets/tiny/train.safetensors",
        "datasets/tiny/dev.safetensors",
        "pictures/class0/illust0_0.png",
    ],
    "export.py": [
        "runs/nano/model.safetensors",
        "runs/lora/adapter_model.safetensors",
        "runs/lora/adapter_config.json",
    ],
    "ingest.toon": [],
    "experiments.run": ["datasets/tiny/train.safetensors"],
    "experiments.report": [
        f"results/study/mine-tiny/{name}" for name in ("PLAN.json", "rows.jsonl", "images.json")
    ],
    "experiments.stress": [
        "runs/nano/model.safetensors",
        "runs/nano/state.pt",
        "datasets/tiny/val.safetensors",
    ],
    "experiments.map_quality": ["runs/nano/model.safetensors", "datasets/tiny/val.safetensors"],
}
HOW = (
    "gone",
    "empty",
    "half",
    "random",
    "pickle",
    "foreign",
    "text",
    "folder",
)  # what is done to a file

NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "0",
    "1" + "0" * 30,
    "",
    " ",
    "½",
    "1e",
    "notes.txt",
    "1\n2",
    "--",
)
WORDS = (
    "",
    " ",
    "nan",
    "-1",
    "ж\n名",
    "../../x",
    "x" * 300,
    "{0}%s%",
    "notes.txt",
    "'",
    "(",
    "a:b=c,d=nan",
    ",,",
)
PATHS = (
    "absent",
    "absent/deep/er",
    "notes.txt",
    "notes.txt/under",
    "",
    "x" * 300,
    "odd/na\nme",
    "odd/名前 'q\" %s",
    "loop",
    "locked",
    "broken/empty",
    "broken/half.safetensors",
    "broken/foreign.safetensors",
    "broken/random.bin",
    "broken/evil.pt",
    "broken/half.zip",
    "broken/run",
    "broken/set",
    "pictures",
    "datasets/tiny",
    "runs/nano",
    "maps/tiny",
    "list.csv",
    "/dev/null",
)
OUTS = (
    "notes.txt",
    "notes.txt/under",
    "runs/nano",
    "runs/lora",
    "datasets/tiny",
    "maps/tiny",
    "pictures",
    "table.csv",
    "picture.png",
    "",
    "x" * 300,
    "odd/na\nme/new",
    "/dev/null/x",
    "results/study/STUDY.md",
    "loop",
)
IS_PATH = {
    "path",
    "data",
    "out",
    "run",
    "runs",
    "encoder",
    "init",
    "teacher",
    "maps",
    "images",
    "reference",
    "portraits",
    "figure",
    "work",
    "dino",
    "pictures",
    "csv",
    "like",
}  # flags that name a file

# Values that fit, and take no time: for flags that do not go together
QUICK = {
    "image_size": [16, 32, 24],
    "patch_size": [7, 8, 16],
    "decoder_dim": [32, 30],
    "decoder_depth": [1],
    "mask": [
        "random",
        "attn_high",
        "attn_hint",
        "fg_heavy",
        "parts",
        "detail",
        "learned",
        "squares",
        "grid",
        "green",
        "block:size=1",
        "attn_high:shuffle=1",
    ],
    "ratio": [".5", ".5:.9", ".999", "0"],
    "teacher": ["runs/nano", "maps", "self"],
    "maps": ["truth", "maps/tiny"],
    "flat_weight": [0, 1],
    "norm_floor": [0, 0.1],
    "epochs": [1],
    "batch_size": [2, 7, 16],
    "accumulate": [1, 3],
    "blr": [0.01],
    "warmup": [0, 1],
    "min_crop": [0.5, 1],
    "seed": [0, 5],
    "eval_every": [1],
    "every": [1],
    "hold_out": [0, 1, 3, 9],
    "margin": [0.3],
    "scale": [8],
    "r": [2],
    "alpha": [0, 1],
    "targets": ["q,v", "q,q"],
    "dropout": [0.1],
    "unfreeze_every": [1],
    "lr": [0.001],
    "head_lr": [0.01],
    "layer_decay": [0.5],
    "weight_decay": [0],
    "patience": [1],
    "seeds": [1],
    "logit_adjust": [1],
    "keep": [0.5],
    "colour": [0, 0.1],
    "cutout": [0.2],
    "mixup": [0.3],
    "cutmix": [0.3],
    "label_smoothing": [0.2],
    "views": [1, 2],
    "threshold": [0.5],
    "reference": ["runs/nano", "runs/lora"],
    "claim": [1],
    "enrol": ["newcomer"],
    "size": [8, 32],
    "dev": [0.3],
    "group_by": ["^[^_]+"],
    "min_per_class": [2, 99],
    "tail": [1],
    "parts": [2],
    "run": ["runs/nano"],
    "init": ["runs/nano"],
    "images": [8],
    "only": ["blur"],
    "rows": [2],
    "columns": [2],
    "who": ["nobody"],
    "jobs": [2],
    "threads": [1],
    "budget": [1],
    "draws": [1],
    "guided": ["attn_low"],
    "recipe": ["--epochs 1"],
    "trial_epochs": [1],
    "scratch_times": [1],
    "arms": ["grid"],
    "encoder": ["runs/nano"],
    "split": [],
    "data": ["datasets/tiny"],
    "model": ["nano", "tiny"],
}
LONG = {"compile", "help"}  # flags that start long work, or none


# ---- calls that have to be refused: (call, its mode, flags that it does not use) -----------------

PRE, PROBE = ["pretrain.py", *SMALL, "--out", "runs/new"], ["probe.py", "runs/nano", *CPU]
TUNE, NAME = (
    ["finetune_lora.py", "runs/nano", *TINY_TUNE, "--out", "runs/new"],
    ["recognize.py", "runs/lora", *CPU],
)
PACK, MAPS = (
    ["data.py", "pictures", *GOOD["data.py"][1:]],
    ["maps.py", "--data", "datasets/tiny", "--device", "cpu"],
)
PICTURE = "pictures/class0/illust0_0.png"
STRESS = ["experiments.stress", "runs/nano", "--images", 8, *CPU]
UNUSED = [
    (
        PRE,
        "--mask random",
        "--teacher runs/nano|--teacher self|--attention cls|--maps truth|--maps maps/tiny",
    ),
    (PRE, "--mask fg_heavy", "--teacher runs/nano|--attention outlier"),
    (PRE, "--mask parts", "--teacher runs/nano|--attention outlier"),
    (PRE, "--mask detail", "--teacher runs/nano|--maps truth"),
    (PRE, "--mask learned", "--teacher runs/nano|--maps truth|--attention cls"),
    (PRE, "--mask attn_high", "--maps maps/tiny|--maps truth"),
    (PRE, "--mask attn_low --teacher runs/nano", "--maps maps/tiny"),
    (PRE, "--mask squares", "--teacher runs/nano"),
    (
        TUNE,
        "--method linear",
        "--lr .1|--unfreeze-every 1",
    ),
    (TUNE, "--method lora", "--unfreeze-every 1"),
    (TUNE, "--method lora --head ifa", "--pool cls|--pool mean"),
    (PROBE, "--headline", "--out new"),
    (NAME, PICTURE, "--data datasets/tiny|--split val|--verify"),
    (
        NAME,
        "--enrol newcomer pictures/class0",
        "--data datasets/tiny|--split val|--threshold .5|--json|--verify",
    ),
    (NAME, "--verify", "--enrol newcomer"),
    (
        ["tags.py", "runs/nano", *TAGS, "--out", "runs/new"],
        "--arm image",
        "--json|--threshold .5",
    ),
    (["tags.py", "runs/nano", *TAGS, "--out", "runs/new"], "--arm tags", "--min-crop .5"),
    (
        ["tags.py", "runs/tags", *CPU],
        PICTURE,
        "--arm vilt|--epochs 3|--data datasets/tiny|--out new|--seed 1",
    ),
    (PACK, "", "--tail 6|--split nan,0,0|--split inf,0,0|--split .5,nan,.5|--drawings 9"),
    (PACK, "", "--crop centre:margin=.2|--crop figure:margin=9|--crop figure:box=1"),
    (
        ["data.py"],
        "--show datasets/tiny",
        "--out new|--size 32|--crop figure|--split .8,.1,.1|--dev .1|--dedupe|"
        "--seed 1|--min-per-class 2",
    ),
    (
        ["data.py"],
        "--show pictures",
        "--split .8,.1,.1|--dev .1|--dedupe|--seed 1|--min-per-class 2|--group-by x",
    ),
    (
        ["data.py"],
        "toon --out datasets/new",
        "--crop figure|--dedupe|--group-by x|--layout class|--detect",
    ),
    (MAPS, "--map saliency", "--attention cls|--parts 4|--run runs/nano"),
    (MAPS, "--map attn --run runs/nano", "--parts 4"),
    (MAPS, "--map parts --run runs/nano", "--attention cls"),
    (STRESS, "--midterm", "--only cutout|--pool cls"),
]
TOO_LARGE = [
    (PRE, "", f"--seed {2**65}"),
    (
        ["tags.py", "runs/nano", *TAGS, "--out", "runs/new"],
        "",
        f"--seed {2**65}|--epochs 1",
    ),
    (TUNE, "", f"--image-size 1000000|--seed {2**65}|--hold-out 4"),
    (PROBE, "--headline", f"--seed {2**65}"),
    (PACK, "", f"--size 1000000|--seed {2**65}|--min-per-class 1000"),
    (
        ["ingest.toon"],
        "--rows 1 --columns 1 --out new.png",
        f"--size 1000000|--rows 0|--seed {2**65}",
    ),
    (["export.py"], "runs/nano --to mae --out new.safetensors", "--image-size 1000000"),
]

# What would be lost: the last of these commands has to be refused, or to leave every file as it is
LOST = [
    [["export.py", "runs/nano", "--to", "timm", "--out", "notes.txt"]],
    [["export.py", "runs/nano", "--to", "hf", "--out", "runs/lora"]],
    [
        ["export.py", "runs/nano", "--to", "mae", "--out", "x.safetensors"],
        ["export.py", "runs/nano", "--to", "timm", "--out", "x.safetensors"],
    ],
    [
        ["export.py", "runs/nano", "--to", "mae"],
        ["export.py", "runs/nano", "--to", "mae", "--image-size", 16],
    ],
    [PROBE + ["--headline"], PROBE + ["--headline", "--split", "dev"]],
    [PROBE + ["--headline"], PROBE + ["--headline", "--seed", 1]],
    [PROBE + ["--views", 1], PROBE + ["--headline"]],
    [PROBE + ["--headline"], PROBE + ["--headline", "--data", "datasets/other"]],
    [STRESS + ["--only", "cutout"], STRESS + ["--only", "cutout", "--data", "datasets/other"]],
    [STRESS + ["--only", "cutout"], STRESS + ["--only", "cutout", "--split", "dev"]],
    [NAME + ["--verify"], NAME + ["--verify", "--split", "dev"]],
    [NAME + ["--verify"], NAME + ["--verify", "--data", "datasets/other"]],
    [MAPS + ["--map", "saliency", "--out", "maps/tiny"]],
    [["maps.py", "--data", "datasets/other", "--map", "saliency", "--out", "maps/tiny"]],
    [
        MAPS + ["--map", "attn", "--run", "runs/nano"],
        MAPS + ["--map", "attn", "--run", "runs/nano", "--attention", "cls"],
    ],
    [["pretrain.py", *SMALL, "--out", "runs/nano"]],
    [["pretrain.py", *SMALL, "--out", "runs/lora"]],
    [["finetune_lora.py", "runs/nano", *TINY_TUNE, "--out", "runs/lora"]],
    [["finetune_lora.py", "runs/nano", *TINY_TUNE, "--out", "runs/nano"]],
    [["tags.py", "runs/nano", *TAGS, "--out", "runs/tags"]],
    [["tags.py", "runs/nano", *TAGS, "--out", "runs/nano"]],
    [["ingest.toon", "--rows", 1, "--columns", 1, "--size", 32, "--out", "picture.png"]],
    [["data.py", "pictures", "--out", "datasets/tiny", "--size", 32]],
    [["data.py", "--show", "datasets/tiny"]] * 2,
]


# ---- the scratch folder --------------------------------------------------------------------------


class Evil:
    """Unpickled, it would write a file."""

    def __reduce__(self):
        return (Path.write_text, (Path("owned"), "by a pickle"))


def render_here(records, draw, size, dims, *_):
    """pack.render without processes."""
    for r in records:
        row = draw(r.place, size)
        style = np.array(
            [toon.STRATA[k].index(v) for k, v in row.get("style", {}).items()], np.uint8
        )
        yield r, {p: (row | {"images": row["image"], "style": style})[p] for p in dims}


def make_sets(base, patch):
    """datasets/tiny, of four characters in 64 pictures with true masks, and datasets/other, another
    draw of it.
    """
    plan = toon.plan

    def few(n=64, characters=4, *more, **options):
        return plan(min(n, 64), min(characters, 4), *more, **options)

    patch.setattr(toon, "plan", few)
    patch.setattr(pack, "render", render_here)
    for seed, name in enumerate(("tiny", "other")):
        pack.pack("toon", base / "datasets" / name, size=32, dev=0.2, seed=seed)


def make_study(folder):
    """Rows of two masks with three seeds."""
    folder.mkdir(parents=True)
    curve = {"epoch": [0, 1], "knn": [20, 30], "linear": [20, 40], "seconds": [0, 9]}
    rows = []
    for i, (mask, seed) in enumerate(itertools.product(("random", "block"), range(3))):
        row = {"arm": mask, "seed": seed, "metrics": {"top1": 50.0 + i}, "curve": curve}
        rows.append(json.dumps(row | {"right": {"top1": f"{i}f"}}))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    plan = {"plan": "mine", "question": "?", "data": "tiny", "split": "val", "seeds": [0, 1, 2]}
    plan |= {"arms": {"random": "random", "block": "random"}, "columns": {"top1": "Top-1, %"}}
    plan["compare"] = ["top1"]
    (folder / "PLAN.json").write_text(json.dumps(plan))
    (folder / "images.json").write_text(json.dumps({"groups": [0, 0, 1, 1, 2, 2, 3, 3]}))


def make_files(base):
    """Files that must not be lost, odd names, and every kind of broken file."""
    for name in (
        "notes.txt",
        "table.csv",
        "picture.png",
        "results/study/STUDY.md",
        "odd/na\nme",
        "odd/名前 'q\" %s",
    ):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("a,b\n1,what nobody wants to lose\n")
    draw_folder(base / "pictures", each=8)
    names = [p.relative_to(base) for p in sorted((base / "pictures").rglob("*.png"))]
    (base / "list.csv").write_text("".join(f"{p},{p.parent.name}\n" for p in names))
    os.symlink("loop", base / "loop")
    model_file = base / "runs/nano/model.safetensors"
    for name, like, how in (
        ("empty", "notes.txt", "empty"),
        ("half.safetensors", model_file, "half"),
        ("foreign.safetensors", model_file, "foreign"),
        ("random.bin", "notes.txt", "random"),
        ("evil.pt", "notes.txt", "pickle"),
        ("half.zip", "list.csv", "random"),
        ("run/model.safetensors", model_file, "half"),
        ("run/state.pt", "notes.txt", "pickle"),
        ("set/train.safetensors", base / "datasets/tiny/train.safetensors", "half"),
        ("set/val.safetensors", base / "datasets/tiny/val.safetensors", "same"),
    ):
        (base / "broken" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(base / like, base / "broken" / name)
        spoil_file(base / "broken" / name, how)
    (base / "broken/half.zip").write_bytes(b"PK\x03\x04" + (base / "broken/half.zip").read_bytes())
    (base / "locked").write_text("x")
    (base / "locked").chmod(0)


def spoil_file(path, how):
    """Put something else in the place of a file, as HOW says."""
    whole = path.read_bytes() if path.is_file() else b""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    new = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "random": random.Random(0).randbytes(max(64, len(whole))),
        "pickle": pickle.dumps(Evil()),
        "foreign": len(head).to_bytes(8, "little") + head + bytes(4),
        "text": 'nan, ж\n{"a": [1, null]}\n'.encode(),
        "same": whole,
    }
    if how == "folder":
        (path / "inside").mkdir(parents=True)
    elif how != "gone":
        path.write_bytes(new[how])


def stub(figure, path, **options):
    """In the place of Figure.savefig, which takes half a second."""
    Path(path).write_bytes(random.Random(repr(options)).randbytes(64) + os.urandom(8))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder with sets, pictures, runs, maps, notes and broken files; beside it, in pristine/,
    the same again.
    """
    base = tmp_path_factory.mktemp("fuzz") / "scratch"
    (base / "tmp").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", stub)
        patch.setitem(
            model.SIZES, "nano", model.SIZES["nano"] | {"dim": 32, "depth": 2, "heads": 2}
        )
        patch.setattr(tempfile, "tempdir", str(base / "tmp"))
        patch.setattr("probe.FEW_SHOT", ((2, 1),))
        make_sets(base, patch)
        call("pretrain.py", *SMALL, "--out", "runs/nano", cwd=base, check=0)
        call(
            "finetune_lora.py",
            "runs/nano",
            *TINY_TUNE,
            "--out",
            "runs/lora",
            "--hold-out",
            1,
            cwd=base,
            check=0,
        )
        call("recognize.py", "runs/lora", "--list", cwd=base, check=0)
        call("tags.py", "runs/nano", *TAGS, "--out", "runs/tags", cwd=base, check=0)
        call(
            "maps.py",
            "--data",
            "datasets/tiny",
            "--map",
            "saliency",
            "--out",
            "maps/tiny",
            cwd=base,
            check=0,
        )
        make_files(base)
        make_study(base / "results/study/mine-tiny")
        shutil.copytree(base, base.parent / "pristine", symlinks=True)
        yield base


def state_of(base):
    """-> {path: what changes when a file is written, or None of a folder}."""
    found = {}
    for folder, folders, files in os.walk(base):
        found |= {os.path.relpath(os.path.join(folder, name), base): None for name in folders}
        for name in files:
            path = os.path.join(folder, name)
            stat = os.lstat(path)
            found[os.path.relpath(path, base)] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    return found


def digest(path):
    return hashlib.blake2b(path.read_bytes()).digest() if path.is_file() else os.path.lexists(path)


def changed(base, before, contents):
    """Files that were there and now are gone or have other bytes; contents: {path: digest} before
    the call.
    """
    after = state_of(base)
    touched = [p for p, mark in before.items() if mark is not None and after.get(p) != mark]
    return [p for p in touched if digest(base / p) != contents(p)], [
        p for p in after if p not in before
    ]


def put_back(base):
    """The scratch folder as it was made."""
    pristine = base.parent / "pristine"
    there, wanted = state_of(base), state_of(pristine)
    for path in sorted(there.keys() | wanted.keys()):
        now, then = base / path, pristine / path
        same = path in there and path in wanted and (there[path] is None) == (wanted[path] is None)
        if same and (there[path] is None or there[path][:2] == wanted[path][:2]):
            continue
        if now.is_dir() and not now.is_symlink():
            shutil.rmtree(now)
        elif os.path.lexists(now):
            now.unlink()
        if path in wanted and now.parent.is_dir():
            shutil.copytree(then, now, symlinks=True) if wanted[path] is None else shutil.copy2(
                then, now, follow_symlinks=False
            )


# ---- the calls -----------------------------------------------------------------------------------


def flags_of(stage):
    """The actions of a stage's parser, its positional arguments included."""
    found = {}

    def keep(parser):
        found["actions"] = parser._actions
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "format_help", keep)
        call(stage, "--help", cwd=ROOT, check=0)
    return [a for a in found["actions"] if a.dest not in LONG]


def with_flag(words, action, *values):
    """The words with this flag, or this positional argument, at another value."""
    words = list(words)
    if not action.option_strings:  # the first word is the first positional argument
        return [*values, *words[1:]]
    for name in action.option_strings:
        if name in words:
            i = words.index(name)
            del words[i : i + 1 + (action.nargs != 0)]
    plain = len(values) == 1 and action.nargs not in ("+", "*")
    return (
        [*words, f"{action.option_strings[0]}={values[0]}"]
        if plain
        else [*words, action.option_strings[0], *values]
    )


def is_number(action):
    return (
        action.type is not None
        and action.type not in (str, Path)
        and getattr(action.type, "__name__", "") not in ("parse_shares", "regex")
    )


def value_cases(stage, actions, rng):
    """Each flag at values that are none of its type."""
    for action in actions:
        if action.nargs == 0 or action.dest in IS_PATH:
            continue
        number = is_number(action)
        for value in rng.sample(
            NUMBERS if number else WORDS, 2 if action.choices else 4 if number else 3
        ):
            hopeless = number and value not in (
                "-1",
                "0",
            )  # nan, inf, what is no number, what is beyond all bounds
            yield Case(
                "value", stage, [], [[stage, *with_flag(GOOD[stage], action, value)]], hopeless
            )


def path_cases(stage, actions, rng):
    """Each flag that names a file, at paths that are none of that kind; inputs that are broken."""
    for action in actions:
        if action.dest in IS_PATH and not (action.choices or action.type):
            some = OUTS if action.dest in ("out", "figure", "work") else PATHS
            for value in rng.sample(
                some, 6 if action.dest in ("data", "out", "run", "encoder", "path") else 4
            ):
                yield Case("path", stage, [], [[stage, *with_flag(GOOD[stage], action, value)]])
    good = [GOOD[stage], *(words for other, words in MORE if other == stage)]
    for path in INPUTS[stage]:
        for how in rng.sample(HOW, 3):
            yield Case("input", stage, [(path, how)], [[stage, *rng.choice(good)]])


def pair_cases(stage, actions, rng, count):
    """Flags at values that fit, which may not go together."""
    good = [GOOD[stage], *(words for other, words in MORE if other == stage)]
    for _ in range(count):
        words = list(rng.choice(good))
        for action in rng.sample(
            [a for a in actions if a.option_strings], min(3, len(actions) - 2)
        ):
            values = [] if action.nargs == 0 else list(action.choices or QUICK.get(action.dest, ()))
            if action.dest == "model":
                values = QUICK["model"]
            if action.nargs == 0 or values:
                words = with_flag(words, action, *([rng.choice(values)] if values else []))
        if "all" not in map(str, words) and (stage != "experiments.run" or "--dry" in words):
            yield Case("pair", stage, [], [[stage, *words]])


def repeat_cases(stage):
    """The same command twice: refused."""
    yield Case("repeat", stage, [], [[stage, *GOOD[stage]]] * 2)


def all_cases():
    """Some four hundred calls, always the same."""
    cases = [Case("lost", commands[-1][0], [], commands) for commands in LOST]
    for base, mode, flags in UNUSED + TOO_LARGE:
        for flag in flags.split("|"):
            words = [*base[1:], *shlex.split(mode), *shlex.split(flag)]
            cases.append(
                Case("unused", base[0], [], [[base[0], *words]], re.findall(r"--[\w-]+", flag))
            )
    for stage in GOOD:
        rng, actions = random.Random(f"{SEED} {stage}"), flags_of(stage)
        cases += [
            *value_cases(stage, actions, rng),
            *path_cases(stage, actions, rng),
            *pair_cases(stage, actions, rng, 8),
            *repeat_cases(stage),
        ]
    return cases


def in_words(case, base):
    """A case as lines for a shell."""

    def python(w):
        return str(ROOT / w[0]) if w[0].endswith(".py") else f"-m {w[0]}"

    lines = [f"# {path} is {how} here" for path, how in case.spoil]
    lines += [
        f"PYTHONPATH={ROOT} python {python(w)} {shlex.join(map(str, w[1:]))}" for w in case.commands
    ]
    return f"cd {base}\n" + "\n".join(lines)


# ---- what every call has to keep -----------------------------------------------------------------


def complaints(case, base, patch):
    """What is wrong with a call: lines, none if it is as it should be."""
    for path, how in case.spoil:
        spoil_file(base / path, how)
    for words in case.commands[:-1]:
        patch.setattr("sys.stdin", io.StringIO("absent.png\n"))
        call(*words, cwd=base)
    before = state_of(base)
    spoiled, commands = {path for path, _ in case.spoil}, [*map(str, case.commands[-1])]
    given = {word.partition("=")[0] for word in commands}
    digests = {
        p: digest(base / p)
        for p in before
        if before[p] is not None and (p in spoiled or len(case.commands) > 1)
    }

    def contents(p):
        return digests[p] if p in digests else digest(base.parent / "pristine" / p)

    patch.setattr("sys.stdin", io.StringIO("absent.png\n"))
    try:
        done = call(*commands, cwd=base)
    except BaseException as problem:  # whatever it is: it reached the user as a traceback
        trace = traceback.extract_tb(problem.__traceback__)[-1]
        return [
            f"{type(problem).__name__}: {problem} in {Path(trace.filename).name}, line {trace.lineno}"
        ]
    found, errors = (
        [],
        [line for line in done.stderr.split("\n") if line.startswith(("error", "usage"))],
    )
    if done.returncode not in (0, 2):
        found.append(f"status {done.returncode}")
    if "Traceback" in done.stdout + done.stderr:
        found.append("prints a traceback")
    if done.returncode == 2 and not (
        len(errors) == 1 and done.stderr.rstrip("\n").split("\n")[-1] == errors[0]
    ):
        found.append(f"refused in other words than one line: {done.stderr[-300:]!r}")
    if done.returncode == 2 and re.search(r"<_io|object at 0x", "".join(errors)):
        found.append(f"speaks to programmers: {errors[0]}")
    if done.returncode == 0 and case.refused:
        found.append("accepted what it can't use")
    if (
        errors
        and isinstance(case.refused, list)
        and not any(flag in errors[0] for flag in case.refused)
    ):
        found.append(f"refused for another reason: {errors[0]}")
    lost, new = changed(base, before, contents)
    free = done.returncode == 0 and "--resume" in given
    grows = (
        "gallery.safetensors" if done.returncode == 0 and {"--enrol", "--forget"} & given else None
    )
    found += [f"changed {path}" for path in lost if not (free or Path(path).name == grows)]
    found += [
        f"left {path}"
        for path in new
        if path.endswith((".tmp", ".lock")) or path.startswith("tmp/")
    ]
    if (base / "owned").exists():
        found.append("ran code out of a pickle")
    return found


def judge(cases, base):
    """All cases, one after the other; those that fail are printed together."""
    failed = []
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            if found := complaints(case, base, patch):
                failed.append("\n".join([*found, in_words(case, base)]))
        put_back(base)
    assert not failed, f"{len(failed)} of {len(cases)} calls:\n\n" + "\n\n".join(failed)


@pytest.mark.slow
def test_the_scratch_folder_is_put_back(scratch):
    wanted = {p: m and m[:2] for p, m in state_of(scratch.parent / "pristine").items()}
    for path in ("notes.txt", "runs/nano", "pictures/class0/illust0_0.png"):
        spoil_file(scratch / path, "folder")
    spoil_file(scratch / "datasets/tiny/val.safetensors", "half")
    (scratch / "new/deep").mkdir(parents=True)
    put_back(scratch)
    assert {p: m and m[:2] for p, m in state_of(scratch).items()} == wanted


@pytest.mark.slow
def test_the_calls_that_the_bad_ones_are_made_of_work(scratch):
    failed = []
    for stage, words in [*GOOD.items(), *MORE]:
        if (done := call(stage, *words, cwd=scratch)).returncode:
            failed.append((stage, words, done.stderr))
        put_back(scratch)
    assert not failed, failed


def test_thirty_bad_calls(scratch):
    quick = [c for c in all_cases() if c.kind in ("value", "path", "unused")]
    judge(random.Random(SEED).sample(quick, 30), scratch)


def test_there_are_enough_calls():
    cases = all_cases()
    assert len(cases) >= 400 and {c.stage for c in cases} == GOOD.keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", GOOD)
def test_bad_calls(stage, scratch):
    judge([c for c in all_cases() if c.stage == stage], scratch)
