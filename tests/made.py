"""A home with small data sets and a run of every stage, made once in seconds: what applications are tested on."""

import contextlib
import functools
import shutil

import numpy as np
import pytest
from conftest import FIGURES, HOME, WORDS, draw_folder, run_line
from filelock import FileLock
from golden import write_frames

import model
from ingest import pack, scenes

CPU = "--device cpu --dtype fp32"
QUICK = f"--batch-size 8 --epochs 2 {CPU}"
NANO = "nano:image_size=32,patch_size=8,decoder_dim=32"
SIZE = {"dim": 32, "depth": 4, "heads": 2}
PACKED = "--size 32 --split .6,.2,.2 --dev .15"
COMMANDS = (  # of home, in their order
    f"data.py list.csv --out datasets/packed {PACKED}",
    f"data.py list.csv --out datasets/other {PACKED} --seed 1",
    f"pretrain.py --data datasets/packed --model {NANO} --out runs/a {QUICK}",
    f"finetune_lora.py runs/a --method lora --split val --epochs 12 --keep 1 --batch-size 16 {CPU}",
    f"apps.recognize runs/a-lora images/class0/illust0_0.png {CPU}",
    f"apps.tags runs/a --data datasets/packed {QUICK}",
    f"apps.segment runs/a --data datasets/frames --pixel-steps 1 --epochs 2 {CPU}",
    f"apps.detect runs/a --data datasets/scenes --method lora --view 48 {QUICK}",
    "apps.maps --data datasets/packed --map saliency --device cpu",
)


def render_here(records, draw, size, dims, *_):
    """pack.render without processes."""
    for record in records:
        row = draw(record.place, size)
        yield record, {plane: (row | {"images": row["image"]})[plane] for plane in dims}


def write_list(base):
    """list.csv: the pictures of images/, each with its class and tags; some have no tag."""
    rng, rows = np.random.default_rng(0), ["path,label,tags"]
    for i, path in enumerate(sorted((base / "images").rglob("*.png"))):
        tags = [WORDS[int(path.parent.name[-1])]] + [w for w in WORDS[3:] if rng.random() < 0.5]
        cells = path.relative_to(base).as_posix(), path.parent.name, " ".join(tags) * bool(i % 9)
        rows.append(",".join(cells))
    (base / "list.csv").write_text("\n".join(rows))


def make_home(base):
    draw_folder(base / "images", classes=3, each=24)
    write_list(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "nano", model.SIZES["nano"] | SIZE)
        patch.setattr(scenes, "COUNTS", {"train": 16, "dev": 4, "val": 4})
        patch.setattr(pack, "render", render_here)
        for name in FIGURES:  # they take a third
            patch.setattr(name, lambda *_, **__: None)
        pack.pack("scenes", base / "datasets/scenes", size=64)
        write_frames(base / "datasets/frames")
        for line in COMMANDS:
            with contextlib.suppress(pytest.skip.Exception):  # its extra is not here
                run_line(line, base, check=0)


@functools.cache
def pristine():
    """The folder itself, made by the first process that asks for it; nothing may write into it."""
    with FileLock(HOME / "lock"):
        if not (HOME / "made").exists():
            # Where it fails, the next process begins anew, and says the same.
            shutil.rmtree(HOME / "begun", ignore_errors=True)
            make_home(HOME / "begun")
            (HOME / "begun").rename(HOME / "made")
    return HOME / "made"


def home(where):
    """A copy of it in the folder where/ -> its path."""
    return shutil.copytree(pristine(), where / "home", symlinks=True)


def files_of(folder):
    """{path: bytes} of all files but locks."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: path.read_bytes() for path in paths if path.suffix != ".lock"}
