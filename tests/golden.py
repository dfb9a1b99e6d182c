"""The net under every move of code: small seeded CPU runs of all stages, and what came out of each.

    python tests/golden.py OLD NEW   do two commits give the same bits here? "." is the working tree
    python tests/golden.py --write   write tests/golden.json anew, where results are meant to change

A case is one command or more, run as a user runs them, and the files that they leave. Two commits
are compared by a digest of every weight, map and metric. golden.json keeps a few sums of them,
which other kinds of CPU reach, too. tests/lesson/test_golden.py compares today's code with it.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from conftest import each_flag_once
from PIL import Image
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent

GOLDEN = ROOT / "tests" / "golden.json"

# ---- the cases -----------------------------------------------------------------------------------
# A flag that comes twice has its last value. A case may use what an earlier one left.

CPU = "--device cpu --dtype fp32"
PRETRAIN = f"pretrain.py --data packed --batch-size 16 --epochs 3 {CPU} --contrast none"
PRETRAIN += " --model nano:image_size=32"
TUNE = f"finetune_lora.py runs/random --data packed --split val --batch-size 16 --epochs 2 {CPU}"
PACK = "data.py {} --size 32 --split .6,.2,.2 --dev 0.1 --dedupe off"
SHORT = f"runs/random --batch-size 8 --epochs 2 {CPU}"
SEGMENT = "apps.segment runs/random --data frames"
MAPS = "apps.maps --data packed --device cpu"

PRETRAINED = {  # case: flags of pretrain.py
    **{mask: f"--mask {mask}" for mask in ("random", "block", "grid", "green", "detail", "parts")},
    **{mask: f"--mask {mask}" for mask in ("fg_heavy", "bg_heavy")},
    **{mask: f"--mask {mask}:start=.3" for mask in ("attn_high", "attn_low", "attn_hint")},
    "learned": "--mask learned:start=.1",
    "simmim": "--model nano:image_size=32,simmim=1",
    "pooler": "--mask attn_high:start=.3 --contrast pooler",
    # a sharp temperature magnifies the rounding of a CPU: CLS tokens begin all but alike
    "cls": "--contrast cls:weight=.03,temperature=1,dcl=1",
    "raw_pixels": "--no-norm-pix --flat-weight 1",
    "schedule": "--mask fg_heavy:shuffle=1 --ratio .5:.8 --min-crop 0.6",
    "teacher": "--mask attn_high --teacher runs/random --attention cls",
    "adapted": "--mask attn_low --init runs/random",
}
TUNED = {  # case: flags of finetune_lora.py
    "linear": "--method linear --epochs 10",
    "lora": "--method lora:r=4",
    "lora_arcface": "--head arcface --pool cls",
    "lora_cosface": "--head cosface",
    "full": "--method full --unfreeze-every 1",
    "full_curricular": "--method full --head curricularface --balanced",
    "ifa": "--method full --head ifa --logit-adjust 1",
    "scratch": "--method full --from-scratch --keep 1 --hold-out 1",
}
CASES = {name: [f"{PRETRAIN} {flags} --out runs/{name}"] for name, flags in PRETRAINED.items()}
CASES |= {name: [f"{TUNE} {flags} --out runs/{name}"] for name, flags in TUNED.items()}
CASES |= {
    "coarse": [f"{MAPS} --map saliency --out maps/coarse"],
    "pack": ["data.py images --out datasets/pack --size 32 --dev 0.1 --group-by ^[^_]+"],
    "pack_figure": [
        "data.py images --out datasets/pack_figure --size 24 --crop figure --dedupe drop"
    ],
    "probe": [f"probe.py runs/random runs/simmim --data packed {CPU}"],
    "headline": [f"probe.py runs/block --data packed --headline {CPU}"],
    "part_maps": [f"{MAPS} --map parts --run runs/random --parts 3 --out maps/part_maps"],
    "attn_maps": [f"{MAPS} --map attn --run runs/random --out maps/attn_maps"],
    "recognize": [f"apps.unknown runs/lora --data packed {CPU}"],
    "strangers": [f"apps.unknown runs/scratch --data packed {CPU}"],
    "segment": [f"{SEGMENT} --out runs/segment --epochs 2 --pixel-steps 40 {CPU}"],
    "export": ["apps.export runs/random --to mae --out runs/export/mae.safetensors"],
    "detect": [
        PACK.format("boxes.json --detect --out datasets/detect"),
        f"apps.detect {SHORT} --data datasets/detect --out runs/detect --view 32 --method full",
    ],
}
for name, arm in (("tags", ""), ("vilt", " --arm vilt")):
    CASES[name] = [
        PACK.format(f"list.csv --out datasets/{name}"),
        f"apps.tags {SHORT} --data datasets/{name} --out runs/{name}{arm}",
    ]


# ---- the data: pictures that a formula gives, the same on every machine --------------------------


def make_pictures(n, side, classes=4, seed=0):
    """-> images u8 (n, side, side, 3), labels (n,), opacity u8 and parts u8 (n, side, side)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    y, x = np.mgrid[0:side, 0:side] / side
    centre, size = rng.uniform(0.4, 0.6, (n, 2, 1, 1)), rng.uniform(0.2, 0.4, (n, 2, 1, 1))
    radius = ((y - centre[:, 0]) / size[:, 0]) ** 2 + ((x - centre[:, 1]) / size[:, 1]) ** 2
    inside = radius < 1
    # 1, 2, 3 in the foreground
    parts = np.where(inside, 1 + (radius > 0.3) + (y > centre[:, 0]), 0).astype(np.uint8)
    palette = np.random.default_rng(1).integers(0, 256, (classes, 4, 3))
    background = rng.integers(0, 256, (n, 1, 1, 3)) * np.ones((1, side, side, 1))
    pixels = np.where(inside[..., None], palette[labels[:, None, None], parts], background)
    noise = rng.normal(0, 12, (n, side, side, 3)) * (x > 0.5)[..., None]  # the left half is flat
    images = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return images, labels, (inside * 255).astype(np.uint8), parts


def write_split(folder, name, source, tensors, **more):
    """The file that data.py would write of these pictures."""
    n, side = tensors["images"].shape[:2]
    about = {"format": 1, "source": source, "size": side, "split": name, "style": None}
    about |= {"keys": [f"{name}{i}" for i in range(n)], "groups": None, "parts": None}
    about |= {"tags": [], "notes": [], "skipped": 0, "skipped_first": []}
    about |= {"crop": "centre", "margin": 0.1} | more
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors", {"animask": json.dumps(about)})


def write_packed(folder, side=48, counts=(("train", 96), ("val", 48), ("dev", 24))):
    for seed, (name, n) in enumerate(counts):
        images, labels, fg, parts = make_pictures(n, side, seed=seed)
        tensors = {"images": images, "fg": fg, "parts": parts, "labels": labels.astype(np.int64)}
        more = {"classes": [f"class{c}" for c in range(4)]}
        more |= {"groups": [f"{name}{i // 2}" for i in range(n)]}
        more |= {"parts": ["back", "one", "two", "three"]}
        write_split(folder, name, "golden", tensors, **more)


def write_frames(folder, side=32, counts=(("train", 36), ("dev", 18), ("val", 18), ("test", 9))):
    """As of `data.py hybrid`: drawn, noisy, and half of each, with their masks."""
    for seed, (name, n) in enumerate(counts):
        images, _, _, _ = make_pictures(n, side, seed=20 + seed)
        noise = np.random.default_rng(seed).normal(128, 40, images.shape).clip(0, 255)
        labels = np.arange(n) % 3
        drawn = np.full((n, side, side), 255, np.uint8)
        drawn[labels == 1] = 0
        drawn[labels == 2, :, side // 2 :] = 0
        frames = np.where(drawn[..., None] > 0, images, noise.astype(np.uint8))
        tensors = {"images": frames, "drawn": drawn, "labels": labels.astype(np.int64)}
        more = {"classes": ["drawn", "photographed", "panels"]}
        more |= {"hybrid": {"mixed": ["panels"], "purely": []}}
        write_split(folder, name, "hybrid", tensors, **more)


def write_pictures(work):
    """Loose PNG files with alpha, a folder per class; list.csv of their tags, boxes.json (COCO)."""
    images, labels, fg, _ = make_pictures(64, 40, seed=9)
    lines = ["path,label,tags"]
    records, boxes = [], []
    for i, label in enumerate(labels):
        name = f"images/class{label}/i{i // 8}_{i}.png"
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate([images[i], fg[i, ..., None]], 2)).save(work / name)
        light = "bright" if images[i].mean() > 127 else "dark"
        lines.append(f"{name},class{label},colour{label} {light} size{i % 3}")
        left, top, right, bottom = Image.fromarray(fg[i]).getbbox()
        width, height = right - left, bottom - top
        records.append({"id": i, "file_name": name, "width": 40, "height": 40})
        box = {"id": i, "image_id": i, "category_id": 1, "bbox": [left, top, width, height]}
        boxes.append(box | {"area": width * height, "iscrowd": 0})
    (work / "list.csv").write_text("\n".join(lines))
    coco = {"images": records, "annotations": boxes, "categories": [{"id": 1, "name": "face"}]}
    (work / "boxes.json").write_text(json.dumps(coco))


def write_data(work):
    write_packed(work / "packed")
    write_frames(work / "frames")
    write_pictures(work)


# ---- running -------------------------------------------------------------------------------------


def run_all(root, work):
    """Every case with the code in root -> {case: {name: array}}.

    One thread, and no core of this machine's kind: nothing but the code decides the bits.
    """
    write_data(work)
    one = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(root),
    }
    how = {"cwd": work, "env": os.environ | one, "stdout": subprocess.DEVNULL}
    for lines in CASES.values():
        for line in lines:
            script, *words = each_flag_once(line.split())
            start = [root / script] if script.endswith(".py") else ["-m", script]
            subprocess.run([sys.executable, *start, *words], check=True, **how)
    return {name: outcome(work, name) for name in CASES}


# ---- what came out -------------------------------------------------------------------------------

LATER = {  # files that a later case writes into the folder of an earlier one
    "probe": ["runs/random/probe.json", "runs/compare/compare.json"],
    "headline": ["runs/block/probe-headline.json"],
    "recognize": ["runs/lora/recognize.json", "runs/lora/gallery.safetensors"],
    "strangers": ["runs/scratch/recognize.json", "runs/scratch/gallery.safetensors"],
}
PARTS = ("model", "guide", "net", "weights")  # of state.pt
# keys that no two runs have alike, alone or at the end of a name
TIMES = (
    r"(^|_)(seconds|images_per_s|data_wait|memory_mb|minutes|time|ms|per_s|commit|command|machine)$"
)


def files_of(work, name):
    """What the case left in runs/, maps/ or datasets/."""
    if name in LATER:
        return [work / path for path in LATER[name]]
    later = {Path(path).name for path in sum(LATER.values(), [])}
    found = []
    for folder in ("runs", "maps", "datasets"):
        found += sorted((work / folder / name).glob("*"))
    return [path for path in found if path.name not in later]


def outcome(work, name):
    """{name: array or number} of all that a case left."""
    found = {}
    for path in files_of(work, name):
        at = path.name.removesuffix(".pt")
        found |= {f"{at}/{key}": value for key, value in arrays_of(path).items()}
    assert found, f"{name} left nothing"
    return found


def arrays_of(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pt":
        found, state = {}, torch.load(path, weights_only=True)
        for part in PARTS:
            weights = state.get(part, {}).items()
            found |= {f"{part}/{k}": w.numpy() for k, w in weights if isinstance(w, torch.Tensor)}
        return found
    if path.suffix not in (".json", ".jsonl") or "config" in path.name:
        return {}
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else []
    found = leaves(rows or [json.loads(text)])
    return {".".join(keys): np.float64(x) for keys, x in found.items() if type(x) in (int, float)}


def leaves(value, *at):
    """{keys on the way to it: value} of all that stands in dicts and lists, but times."""
    if not isinstance(value, dict | list | tuple):
        return {at: value}
    found = {}
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        if not re.search(TIMES, str(key)):
            found |= leaves(part, *at, str(key))
    return found


def digests(found):
    """{name: a hash of the bits and the dtype}."""
    texts = {k: np.ascontiguousarray(v).tobytes() + str(v.dtype).encode() for k, v in found.items()}
    return {k: hashlib.sha256(text).hexdigest()[:16] for k, text in texts.items()}


SCORES = re.compile(
    r"val_mse|\.loss|top[15]$|macro_f1$|\.(map|eer|roc_auc|auroc\w*|knn|linear|threshold|temperature)$"
)
LEFT_OUT = re.compile(r"config|chance|per_class|controls|thumb|images")
# The neck cancels the bias of the encoder's last norm, so that bias has no gradient but rounding,
# of which Adam makes whole steps. The neck's mean moves with it, on each kind of CPU elsewhere.
# What comes out of the neck is the gallery of the cases recognize and strangers.
CANCELLED = re.compile(r"^head\.safetensors/neck\.running_")


def summary(found):
    """A few numbers of a case: of each file of weights the mean and the root mean square; scores."""
    sums, files = {}, {}
    for key, value in found.items():
        if CANCELLED.search(key):
            continue
        if value.ndim:
            files.setdefault(key.rsplit("/", 1)[0], []).append(value.astype(np.float64).ravel())
        elif SCORES.search(key) and not LEFT_OUT.search(key):
            sums[key] = float(value)
    for name, parts in files.items():
        x = np.concatenate(parts)
        sums[f"{name}/mean"], sums[f"{name}/rms"] = float(x.mean()), math.sqrt(float((x**2).mean()))
    return {k: float(f"{v:.8g}") for k, v in sorted(sums.items()) if math.isfinite(v)}


# ---- comparing -----------------------------------------------------------------------------------


def at_commit(commit, folder):
    """A checkout of that commit, or the working tree itself."""
    if commit == ".":
        return ROOT
    command = ["git", "-C", ROOT, "worktree", "add", "--detach", "-f", folder, commit]
    subprocess.run(command, check=True)
    return folder


def compare(old, new):
    """Run both -> the number of cases that differ. Each case is printed as a line."""
    with tempfile.TemporaryDirectory() as base, ThreadPoolExecutor(2) as pool:
        works = [Path(base) / name for name in ("old", "new")]
        roots = [at_commit(old, Path(base) / "old-code"), at_commit(new, Path(base) / "new-code")]
        for work in works:
            work.mkdir()
        results = list(pool.map(run_all, roots, works))
    subprocess.run(["git", "-C", ROOT, "worktree", "prune"], check=True)
    wrong = 0
    for case in results[0]:
        before, after = (digests(result[case]) for result in results)
        other = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
        wrong += bool(other)
        same = f"the same {len(before)} arrays and numbers"
        print(f"{case:16} {f'{len(other)} DIFFER: {other[:6]}' if other else same}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="two; . is the working tree")
    parser.add_argument("--write", action="store_true", help="write tests/golden.json anew")
    args = parser.parse_args()
    if len(args.commits) == 2:
        sys.exit(compare(*args.commits) > 0)
    if not args.write:
        parser.error("give two commits, or --write")
    with tempfile.TemporaryDirectory() as work:
        found = run_all(ROOT, Path(work))
    sums = {case: summary(values) for case, values in sorted(found.items())}
    GOLDEN.write_text(json.dumps(sums, indent=1) + "\n")
    print(f"{GOLDEN} written: {len(found)} cases")


if __name__ == "__main__":
    main()
