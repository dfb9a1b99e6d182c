"""The net under every move of code: small seeded CPU runs of all stages, and what came out of each.

    python tests/golden.py OLD NEW       do two commits give the same bits on this machine? ("." \\
        is the working tree)
    python tests/golden.py --write       write tests/golden.json anew: only where the results are \\
        meant to change

Writes: tests/golden.json: {case: {number's name: value}}; tests/test_golden.py holds today's code
to it at 1e-4.

A case is one or more commands, run as a user runs them, and the files that they leave. Bits are
compared by a digest of every weight, map and metric; golden.json keeps a few sums of them, which
other kinds of CPU reach, too.
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden.json"
CPU = ("--device", "cpu", "--dtype", "fp32")
NANO = ("--data", "packed", "--batch-size", 16, "--epochs", 3, *CPU)
MAE = ("--model", "nano:image_size=32")
SIMMIM = ("--model", "nano:image_size=32,simmim=1")
TUNE = ("--data", "packed", "--batch-size", 16, "--epochs", 2, *CPU)
PACK = ("--size", 32, "--split", ".6,.2,.2", "--dev", 0.1, "--dedupe", "off")
SHORT = ("--batch-size", 8, "--epochs", 2, *CPU)
TIMES = (
    "seconds",
    "images_per_s",
    "data_wait",
    "memory_mb",
    "minutes",
    "time",
    "ms",
    "per_s",
    "commit",
    "command",
    "machine",
)  # what no two runs have alike

MASKS = (
    "random",
    "block",
    "grid",
    "green",
    "attn_high:start=.3",
    "attn_low:start=.3",
    "attn_hint:start=.3",
    "fg_heavy",
    "bg_heavy",
    "parts",
    "detail",
    "learned:start=.1",
)


def pretrain(name, *flags):
    model = [] if "--model" in flags else MAE
    contrast = [] if "--contrast" in flags else ["--contrast", "none"]
    return ["pretrain.py", "--out", f"runs/{name}", *NANO, *model, *contrast, *flags]


def finetune(name, *flags):
    return ["finetune_lora.py", "runs/random", "--out", f"runs/{name}", *TUNE, *flags]


def short(mask):
    return mask.split(":")[0]


FIRST = {short(m): [pretrain(short(m), "--mask", m)] for m in MASKS} | {
    "simmim": [pretrain("simmim", *SIMMIM)],
    "pooler": [pretrain("pooler", "--mask", "attn_high:start=.3", "--contrast", "pooler")],
    # a sharp temperature magnifies the rounding of a CPU: an untrained encoder's CLS tokens are all
    # but alike
    "cls": [pretrain("cls", "--contrast", "cls:weight=.03,temperature=1,dcl=1")],
    "raw_pixels": [pretrain("raw_pixels", "--no-norm-pix", "--flat-weight", 1)],
    "schedule": [
        pretrain("schedule", "--mask", "fg_heavy:shuffle=1", "--ratio", ".5:.8", "--min-crop", 0.6)
    ],
    "coarse": [
        [
            "maps.py",
            "--data",
            "packed",
            "--map",
            "saliency",
            "--out",
            "maps/coarse",
            "--device",
            "cpu",
        ]
    ],
    "pack": [
        [
            "data.py",
            "images",
            "--out",
            "datasets/pack",
            "--size",
            32,
            "--dev",
            0.1,
            "--group-by",
            "^[^_]+",
        ]
    ],
    "pack_figure": [
        [
            "data.py",
            "images",
            "--out",
            "datasets/pack_figure",
            "--size",
            24,
            "--crop",
            "figure",
            "--dedupe",
            "drop",
        ]
    ],
}
SECOND = {  # these stand on runs/random
    "linear": [finetune("linear", "--method", "linear", "--epochs", 10)],
    "lora": [finetune("lora", "--method", "lora:r=4")],
    "lora_arcface": [finetune("lora_arcface", "--head", "arcface", "--pool", "cls")],
    "lora_cosface": [finetune("lora_cosface", "--head", "cosface")],
    "full": [finetune("full", "--method", "full", "--unfreeze-every", 1)],
    "full_curricular": [
        finetune("full_curricular", "--method", "full", "--head", "curricularface", "--balanced")
    ],
    "ifa": [finetune("ifa", "--method", "full", "--head", "ifa", "--logit-adjust", 1)],
    "scratch": [
        finetune("scratch", "--method", "full", "--from-scratch", "--keep", 1, "--hold-out", 1)
    ],
    "probe": [["probe.py", "runs/random", "runs/simmim", "--data", "packed", *CPU]],
    "headline": [["probe.py", "runs/block", "--data", "packed", "--headline", *CPU]],
    "part_maps": [
        [
            "maps.py",
            "--data",
            "packed",
            "--map",
            "parts",
            "--run",
            "runs/random",
            "--parts",
            3,
            "--out",
            "maps/part_maps",
            *CPU[:2],
        ]
    ],
    "attn_maps": [
        [
            "maps.py",
            "--data",
            "packed",
            "--map",
            "attn",
            "--run",
            "runs/random",
            "--out",
            "maps/attn_maps",
            *CPU[:2],
        ]
    ],
    "teacher": [
        pretrain("teacher", "--mask", "attn_high", "--teacher", "runs/random", "--attention", "cls")
    ],
    "adapted": [pretrain("adapted", "--mask", "attn_low", "--init", "runs/random")],
}
STAGES = {  # of the applications, each on its own kind of data
    "tags": [
        ["data.py", "list.csv", "--out", "datasets/tags", *PACK],
        ["tags.py", "runs/random", "--data", "datasets/tags", "--out", "runs/tags", *SHORT],
    ],
    "vilt": [
        ["data.py", "list.csv", "--out", "datasets/vilt", *PACK],
        ["tags.py", "runs/random", "--data", "datasets/vilt", "--out", "runs/vilt", *SHORT]
        + ["--arm", "vilt"],
    ],
    "detect": [
        ["data.py", "boxes.json", "--detect", "--out", "datasets/detect", *PACK],
        ["detect.py", "runs/random", "--data", "datasets/detect", "--out", "runs/detect", *SHORT]
        + ["--view", 32, "--method", "full"],
    ],
    "segment": [
        [
            "segment.py",
            "runs/random",
            "--data",
            "frames",
            "--out",
            "runs/segment",
            "--epochs",
            2,
            *CPU,
        ]
    ],
    "export": [["export.py", "runs/random", "--to", "mae", "--out", "runs/export/mae.safetensors"]],
}
THIRD = STAGES | {
    "recognize": [["recognize.py", "runs/lora", "--verify", "--data", "packed", *CPU]],
    "strangers": [["recognize.py", "runs/scratch", "--verify", "--data", "packed", *CPU]],
}


# ---- the data: pictures that a formula gives, the same on every machine --------------------------


def make_pictures(n, side, classes=4, seed=0):
    """-> images u8 (n, side, side, 3), labels (n,), opacity u8 (n, side, side), parts u8 (n, side,
    side).
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    y, x = np.mgrid[0:side, 0:side] / side
    centre, size = rng.uniform(0.4, 0.6, (n, 2, 1, 1)), rng.uniform(0.2, 0.4, (n, 2, 1, 1))
    radius = ((y - centre[:, 0]) / size[:, 0]) ** 2 + ((x - centre[:, 1]) / size[:, 1]) ** 2
    inside = radius < 1
    parts = np.where(inside, 1 + (radius > 0.3) + (y > centre[:, 0]), 0).astype(
        np.uint8
    )  # 1, 2, 3 in the foreground
    palette = np.random.default_rng(1).integers(0, 256, (classes, 4, 3))
    ground = rng.integers(0, 256, (n, 1, 1, 3)) * np.ones((1, side, side, 1))
    pixels = np.where(inside[..., None], palette[labels[:, None, None], parts], ground)
    pixels = (
        pixels + rng.normal(0, 12, (n, side, side, 3)) * (x > 0.5)[..., None]
    )  # the left half is flat
    return np.clip(pixels, 0, 255).astype(np.uint8), labels, (inside * 255).astype(np.uint8), parts


def write_packed(folder, side=48, counts=(("train", 96), ("val", 48), ("dev", 24))):
    """The files that data.py would write of these pictures."""
    folder.mkdir(parents=True)
    names = ["back", "one", "two", "three"]
    for seed, (split, n) in enumerate(counts):
        images, labels, fg, parts = make_pictures(n, side, seed=seed)
        keys = [f"{split}{i}" for i in range(n)]
        about = {
            "format": 1,
            "source": "golden",
            "classes": [f"class{c}" for c in range(4)],
            "size": side,
            "split": split,
            "keys": keys,
            "groups": [f"{split}{i // 2}" for i in range(n)],
            "parts": names,
            "style": None,
            "tags": [],
            "notes": [],
            "skipped": 0,
            "skipped_first": [],
            "crop": "centre",
            "margin": 0.1,
        }
        tensors = {"images": images, "fg": fg, "parts": parts, "labels": labels.astype(np.int64)}
        save_file(tensors, folder / f"{split}.safetensors", {"animask": json.dumps(about)})


def write_pictures(folder):
    """Loose PNG files with alpha, a folder per class, some of them copies: what data.py packs."""
    from PIL import Image

    images, labels, fg, _ = make_pictures(64, 40, seed=9)
    for i, (picture, label, alpha) in enumerate(zip(images, labels, fg, strict=True)):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        rgba = np.concatenate([picture, alpha[..., None]], 2)
        Image.fromarray(rgba).save(folder / f"class{label}" / f"i{i // 8}_{i}.png")


def write_tags_and_boxes(work):
    """list.csv names two tags of each of these pictures, boxes.json where its figure is (COCO)."""
    images, labels, fg, _ = make_pictures(64, 40, seed=9)
    lines = ["path,label,tags"]
    records, boxes = [], []
    for i, label in enumerate(labels):
        name = f"class{label}/i{i // 8}_{i}.png"
        light = "bright" if images[i].mean() > 127 else "dark"
        lines.append(f"images/{name},class{label},colour{label} {light} size{i % 3}")
        rows, columns = np.nonzero(fg[i])
        left, top = int(columns.min()), int(rows.min())
        width, height = int(columns.max()) + 1 - left, int(rows.max()) + 1 - top
        records.append({"id": i, "file_name": f"images/{name}", "width": 40, "height": 40})
        box = {"id": i, "image_id": i, "category_id": 1, "bbox": [left, top, width, height]}
        boxes.append(box | {"area": width * height, "iscrowd": 0})
    (work / "list.csv").write_text("\n".join(lines))
    categories = [{"id": 1, "name": "face"}]
    coco = {"images": records, "annotations": boxes, "categories": categories}
    (work / "boxes.json").write_text(json.dumps(coco))


def write_frames(folder, side=32, counts=(("train", 36), ("dev", 18), ("val", 18), ("test", 9))):
    """What `data.py hybrid` would write: drawn, noisy, and half of each, with their masks."""
    folder.mkdir(parents=True)
    classes = ["drawn", "photographed", "panels"]
    kinds = {"mixed": ["panels"], "purely": []}
    for seed, (split, n) in enumerate(counts):
        images, _, _, _ = make_pictures(n, side, seed=20 + seed)
        noise = np.random.default_rng(seed).normal(128, 40, images.shape).clip(0, 255)
        labels = np.arange(n) % 3
        drawn = np.full((n, side, side), 255, np.uint8)
        drawn[labels == 1] = 0
        drawn[labels == 2, :, side // 2 :] = 0
        frames = np.where(drawn[..., None] > 0, images, noise.astype(np.uint8))
        about = {"format": 1, "source": "hybrid", "classes": classes, "size": side}
        about |= {"split": split, "keys": [f"{split}{i}" for i in range(n)], "groups": None}
        about |= {"parts": None, "style": None, "tags": [], "notes": [], "hybrid": kinds}
        about |= {"skipped": 0, "skipped_first": [], "crop": "centre", "margin": 0.1}
        tensors = {"images": frames, "drawn": drawn, "labels": labels.astype(np.int64)}
        save_file(tensors, folder / f"{split}.safetensors", {"animask": json.dumps(about)})


# ---- running -------------------------------------------------------------------------------------


def environment():
    """One thread, and no core of this machine's kind: nothing but the code decides the bits."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_case(root, work, commands):
    for words in commands:
        at = next(i for i, w in enumerate(words) if str(w).endswith(".py"))
        words = [*words[:at], str(Path(root) / words[at]), *words[at + 1 :]]
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(
            command, cwd=work, env=environment(), capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def run_resumed(root, work):
    """A run of four epochs that SIGTERM stops and --resume ends: the same weights as of runs/whole,
    which it makes.
    """
    run_case(root, work, [pretrain("whole", "--mask", "attn_high:start=.3", "--epochs", 8)])
    words = [str(w) for w in pretrain("resume", "--mask", "attn_high:start=.3", "--epochs", 8)]
    command = [sys.executable, str(Path(root) / words[0]), *words[1:]]
    process = subprocess.Popen(
        command, cwd=work, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log = work / "runs" / "resume" / "log.jsonl"
    while process.poll() is None and (not log.exists() or '"loss"' not in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    run_case(root, work, [["pretrain.py", "--resume", "runs/resume"]])


def run_all(root, work, only=None):
    """Every case (or those in `only` and what they stand on) with the code in root -> {case: {name:
    array}}.
    """
    write_packed(work / "packed")
    write_pictures(work / "images")
    write_tags_and_boxes(work)
    write_frames(work / "frames")

    def wanted(cases):
        return {k: v for k, v in cases.items() if only is None or k in only}

    jobs = [
        wanted(FIRST | {"random": FIRST["random"]} if only is None else FIRST),
        wanted(SECOND),
        wanted(THIRD),
    ]
    with ThreadPoolExecutor(int(os.environ.get("JOBS", 2))) as pool:
        for cases in jobs:
            list(pool.map(lambda commands: run_case(root, work, commands), cases.values()))
        if only is None or "resume" in only:
            run_resumed(root, work)
    names = [
        *jobs[0],
        *jobs[1],
        *jobs[2],
        *(["resume", "whole"] if only is None or "resume" in only else []),
    ]
    return {name: outcome(work, name) for name in names}


# ---- what came out -------------------------------------------------------------------------------


def outcome(work, name):
    """{name: array or number} of all that a case left in runs/, maps/ or datasets/."""
    found = {}
    homes = {
        "probe": ["runs/random", "runs/compare"],
        "headline": ["runs/block"],
        "recognize": ["runs/lora"],
        "strangers": ["runs/scratch"],
    }.get(name, [f"runs/{name}", f"maps/{name}", f"datasets/{name}"])
    for file in sorted(f for home in homes for f in (work / home).glob("*")):
        answered = ("recognize.json", "gallery.safetensors")  # what recognize.py leaves
        if (file.name in answered) != (name in ("recognize", "strangers")):
            continue
        if name in ("probe", "headline") and file.name not in (
            "probe.json",
            "probe-headline.json",
            "compare.json",
        ):
            continue
        if name == "resume" and file.suffix == ".jsonl":
            continue  # rows around the stop depend on the moment of the signal
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as f:
                found |= {f"{file.name}/{k}": f.get_tensor(k).numpy() for k in f.keys()}  # noqa: SIM118
        elif file.name == "state.pt":
            state = torch.load(file, weights_only=True)
            parts = {
                k: state[k]
                for k in ("model", "teacher", "predictor", "net", "weights")
                if k in state
            }
            found |= {
                f"state/{k}/{n}": w.numpy()
                for k, part in parts.items()
                for n, w in part.items()
                if isinstance(w, torch.Tensor)
            }
        elif file.suffix in (".json", ".jsonl") and "config" not in file.name:
            rows = (
                [json.loads(line) for line in file.read_text().splitlines()]
                if file.suffix == ".jsonl"
                else [json.loads(file.read_text())]
            )
            for i, row in enumerate(rows):
                found |= {f"{file.name}/{i}{k}": np.float64(v) for k, v in numbers(row).items()}
    assert found, f"{name} left nothing in {homes}"
    return found


def numbers(value, at=""):
    """All numbers of a JSON value, {path: number}; times and machines left out."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return {}
    if isinstance(value, int | float):
        return {at: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = {}
    for k, v in items:
        if not any(word == str(k) or str(k).endswith("_" + word) for word in TIMES):
            found |= numbers(v, f"{at}.{k}")
    return found


def digests(found):
    return {
        k: hashlib.sha256(np.ascontiguousarray(v).tobytes() + str(v.dtype).encode()).hexdigest()[
            :16
        ]
        for k, v in found.items()
    }


TOLD = re.compile(
    r"val_mse|\.loss|top[15]$|macro_f1$|\.(map|eer|roc_auc|auroc\w*|knn|linear|threshold|temperature)$"
)
UNTOLD = re.compile(r"config|chance|per_class|controls|thumb|images")
# The neck cancels the bias of the encoder's last norm, so that bias has no gradient but rounding,
# of which Adam makes whole steps. The neck's mean moves with it, on each kind of CPU elsewhere.
# What comes out of the neck is the gallery of cases recognize and strangers.
CANCELLED = re.compile(r"^head\.safetensors/neck\.running_")


def summary(found):
    """A few numbers of a case: weights and maps by mean and root mean square of each file, metrics
    as they are.
    """
    sums, files = {}, {}
    for k, v in found.items():
        if CANCELLED.search(k):
            continue
        if "/" in k and v.ndim:
            files.setdefault(k.rsplit("/", 1)[0], []).append(v.astype(np.float64).ravel())
        elif TOLD.search(k) and not UNTOLD.search(k):
            sums[k] = float(v)
    for name, parts in files.items():
        x = np.concatenate(parts)
        sums[f"{name}/mean"], sums[f"{name}/rms"] = float(x.mean()), math.sqrt(float((x**2).mean()))
    return {k: float(f"{v:.8g}") for k, v in sorted(sums.items()) if math.isfinite(v)}


# ---- comparing -----------------------------------------------------------------------------------


def at_commit(commit, folder):
    """A checkout of that commit, or the working tree itself."""
    if commit == ".":
        return ROOT
    subprocess.run(
        ["git", "-C", ROOT, "worktree", "add", "--detach", "-f", folder, commit],
        check=True,
        capture_output=True,
    )
    return Path(folder)


def compare(old, new):
    """Run both -> the number of cases that differ, each told in a line."""
    with tempfile.TemporaryDirectory() as base:
        results = []
        for name, commit in (("old", old), ("new", new)):
            root, work = at_commit(commit, Path(base) / f"{name}-code"), Path(base) / name
            work.mkdir()
            results.append(run_all(root, work))
        wrong = 0
        for case in sorted(results[0].keys() | results[1].keys()):
            a, b = (digests(r.get(case, {})) for r in results)
            other = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
            wrong += bool(other)
            print(
                f"{case:16} {'the same ' + str(len(a)) + ' arrays and numbers' if not other else 'DIFFERS: '}"
                f"{', '.join(other[:6])}{f' and {len(other) - 6} more' if len(other) > 6 else ''}"
            )
    subprocess.run(["git", "-C", ROOT, "worktree", "prune"], check=True)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "commits", nargs="*", metavar="COMMIT", help="two of them; . is the working tree"
    )
    parser.add_argument(
        "--write", action="store_true", help="write tests/golden.json from the working tree"
    )
    args = parser.parse_args()
    if len(args.commits) == 2:
        sys.exit(compare(*args.commits) > 0)
    if not args.write:
        parser.error("give two commits, or --write")
    with tempfile.TemporaryDirectory() as work:
        found = run_all(ROOT, Path(work))
    GOLDEN.write_text(
        json.dumps({k: summary(v) for k, v in sorted(found.items())}, indent=1) + "\n"
    )
    print(f"{GOLDEN} written: {len(found)} cases")


if __name__ == "__main__":
    main()
