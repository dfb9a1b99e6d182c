"""The poison test: choices are made on dev, so val and test may hold anything.

Each stage runs twice, the second time on a set whose val and test are noise. Whatever it writes
is the same to the bit, but for the scores that it reports and the pictures. A split's fingerprint
changes with its pixels, and no stage here stores that of val. To add a stage, add a row to CASES.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_line
from golden import leaves
from made import pristine

from common.train import read_log, read_safetensors, save_safetensors

KEPT = 4  # every fourth picture of a poisoned split stays as it is
FAST = "--device cpu --dtype fp32"


# ---- the helper and the comparison ---------------------------------------------------------------


def poison(folder, names=("val", "test")):
    """Spoil splits of a packed set: pixels become noise, all else is shuffled between pictures.

    So labels, tags, boxes and masks stay valid, and belong to another picture. Every fourth
    picture keeps what it has: a network that never learned from the split answers it as before.
    """
    rng = np.random.default_rng(13)
    for name in names:
        path = folder / f"{name}.safetensors"
        arrays, header = read_safetensors(path)
        rows = np.delete(np.arange(len(arrays["images"])), np.s_[::KEPT])
        shuffled = rng.permutation(rows)
        for plane, array in arrays.items():
            array[rows] = array[shuffled]
            if plane == "images":
                array[rows] = torch.randint(256, array[rows].shape, dtype=torch.uint8)
        save_safetensors(arrays, path, header | {"pixels": "poisoned"})  # part of the fingerprint


def contents(path):
    """All values in a file of ours, as one tree."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return read_log(path) if path.suffix == ".jsonl" else json.loads(path.read_text())


def written(folder):
    """{(file, key, ...): value} of everything that a stage wrote, but the pictures.

    A text named `right` says which pictures of the reported split are right. Of its bits only
    those of the pictures count that the poison left alone.
    """
    found = {}
    for path in sorted(folder.rglob("*.*")):
        if path.suffix in (".safetensors", ".pt", ".json", ".jsonl"):
            found |= leaves(contents(path), str(path.relative_to(folder)))
    for name in found:
        if "right" in name:
            digits = found[name].partition(":")[0]
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
            found[name] = torch.from_numpy(bits[::KEPT])
    return found


def same(one, two):
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def differences(clean, poisoned):
    """Names of values that differ between two results of `written`, or that one of them lacks."""
    assert clean, "the stage wrote nothing"
    shared = clean.keys() & poisoned.keys()
    changed = {name for name in shared if not same(clean[name], poisoned[name])}
    return changed | (clean.keys() ^ poisoned.keys())


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two folders with the same encoder and sets of a home, clean and poisoned."""
    base = tmp_path_factory.mktemp("poison")
    for name in ("packed", "frames", "scenes"):
        shutil.copytree(pristine() / "datasets" / name, base / "clean" / name)
    shutil.copytree(base / "clean/packed", base / "clean/nodev")
    (base / "clean/nodev/dev.safetensors").unlink()
    shutil.copytree(pristine() / "runs/a", base / "clean/encoder")
    shutil.copytree(base / "clean", base / "poisoned")
    for name in ("packed", "nodev", "frames"):
        poison(base / "poisoned" / name)
    poison(base / "poisoned/scenes", ["val"])
    return base / "clean", base / "poisoned"


# ---- the stages ----------------------------------------------------------------------------------

SIZE = "nano:image_size=32,dim=32,depth=2,heads=2"
PRETRAIN = f"pretrain.py --data packed --out run --model {SIZE} --mask attn_high {FAST}"
TUNE = f"finetune_lora.py encoder --split val --out run --epochs 3 --batch-size 16 {FAST}"
OF_LOG = {"val_mse", "knn", "linear", "knn_thumbnail", "linear_thumbnail"}
SCORES = {"top1", "top5", "macro_f1", "confusion"}
OF_PROBE = SCORES | {"headline", "head", "mid", "tail", "per_class"}
OF_PROBE |= {"map", "recall1", "recall5", "mean", "half"}
OF_TUNE = SCORES | {"by_size", "top1_interval", "colourless_top1"}
OF_TUNE |= {"thumbnails_top1", "histograms_top1"}
OF_TAGS = {"half", "end", "map", "micro_f1", "macro_f1", "error", "error_top", "ap"}
OF_BOXES = {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"}
OF_BOXES |= {"ar", "ar_small", "ar_medium", "ar_large"}
OF_UNKNOWN = {"verification", "open_set", "calibration_error", "right_when_sure", "right"}
TAGS = f"apps.tags encoder --data packed --out run --epochs 2 --batch-size 16 {FAST}"
SEGMENT = f"apps.segment encoder --data frames --out run --epochs 1 --pixel-steps 2 {FAST}"
DETECT = f"apps.detect encoder --data scenes --out run --epochs 12 --batch-size 8 --view 48 {FAST}"
OF_TWO = f"{TUNE} --data packed --method linear --hold-out 1"
HEAD = f"{OF_TWO} && apps.unknown run {FAST}"
SLOW = ("detect",)
CASES = {  # the commands, their folder of results, keys of what they report
    "pretrain": (f"{PRETRAIN} --epochs 2 --eval-every 1 --batch-size 16", "run", OF_LOG),
    "probe": (f"probe.py encoder --data packed --headline {FAST}", "encoder", OF_PROBE),
    "lora": (f"{TUNE} --data packed", "run", OF_TUNE),
    "without dev": (f"{TUNE} --data nodev --method linear", "run", OF_TUNE),
    "recognize": (HEAD, "run", OF_TUNE | OF_UNKNOWN),
    "tags": (TAGS, "run", OF_TAGS),
    "segment": (SEGMENT, "run", {"val", "val_known"}),
    "detect": (DETECT, "run", OF_BOXES),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)
def test_nothing_but_the_scores_depends_on_what_is_reported(places, case, no_pictures):
    commands, out, reported = CASES[case]
    for place in places:
        for command in commands.split(" && "):
            run_line(command, place, check=0)
    found = differences(*(written(place / out) for place in places))
    for place in places:
        shutil.rmtree(place / "run", ignore_errors=True)
    # The digest of a set is that of all its splits, and decides only whether it is still the same set.
    others = {name for name in found if reported.isdisjoint(name) and name[-1] != "digest"}
    assert not others, "these were chosen on what is reported, or learned from it"
    assert found, "no poison arrived"
