"""How well a run fills in: each kind of patch apart, and all together."""

import json
import math

import torch
from conftest import run_line

from lab import filled


def test_flat_and_detailed_patches_make_all_of_them(at):
    run_line("lab.filled runs/a --data datasets/scenes --out new", at, check=0)
    report = json.loads((at / "new/filled.json").read_text())
    assert report["by_ratio"]
    for ratio, kinds in report["by_ratio"].items():
        flat, detailed, every = (kinds[kind] for kind in ("flat", "detailed", "all"))
        assert flat["patches"] + detailed["patches"] == every["patches"]
        errors = [kind["patches"] * 10 ** (-kind["psnr"] / 10) for kind in (flat, detailed)]
        mean = sum(errors) / every["patches"]
        assert math.isclose(-10 * math.log10(mean), every["psnr"], abs_tol=0.01), ratio


def test_a_flat_patch_is_flat_and_an_error_is_in_bytes():
    view = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    view[:, :16, 16:, 0] = (
        torch.arange(16, dtype=torch.uint8) * 16
    )  # of four patches, one has a gradient
    ids = torch.arange(4)[None]
    kinds = filled.kinds_of(view, ids, 16)
    assert kinds["detailed"].tolist() == [[False, True, False, False]]
    errors = filled.squared_errors(view, torch.full_like(view, 3), ids, 16)
    assert errors[0, [0, 2, 3]].tolist() == [9, 9, 9] and errors[0, 1] > 9


def test_a_patch_that_is_filled_in_exactly_is_alike():
    view = torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    other = view.clone()
    other[:, :16, 16:] = 128  # the second of four patches
    found = filled.similarity(view, other, torch.tensor([[2, 1]]), 16)
    assert found[0, 0] > 0.9 and found[0, 1] < 0.2
