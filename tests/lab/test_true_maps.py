"""lab.true_maps: what a mask may follow in the place of attention, and the place alone."""

import numpy as np
import pytest
from conftest import call

import data
from common import guidance
from lab import true_maps


def test_a_cell_holds_the_share_of_its_pixels_that_show_a_part():
    parts = np.zeros((1, 64, 64), np.uint8)
    parts[0, :2, 0] = 3  # half of the first cell, which has 2 x 2 pixels
    parts[0, 62:, 62:] = 1
    maps = true_maps.shares(parts, [1, 3])
    assert maps.shape == (1, 32, 32)
    assert maps[0, 0, 0] == 0.5 and maps[0, 31, 31] == 1
    assert maps.max() == 1 and maps.min() == np.float32(true_maps.FLOOR)


@pytest.mark.slow
def test_the_mean_map_is_the_same_for_all_pictures_and_guides_a_run(tmp_path):
    packed = tmp_path / "packed"
    call("data.py", "toon", "--drawings", 96, "--size", 64, "--out", packed, cwd=tmp_path, check=0)
    split = data.open_split(packed, "train")
    found = {}
    for name, flags in {"true": (), "place": ("--mean",)}.items():
        out = tmp_path / name
        call("lab.true_maps", packed, *flags, "--out", out, cwd=tmp_path, check=0)
        found[name] = np.array(guidance.open_maps("attn", str(out), packed, split)[0], np.float32)
    assert (found["place"] == found["place"][0]).all()
    assert (found["true"] != found["true"][0]).any()
    mean = np.exp(np.log(found["true"]).mean(0))
    np.testing.assert_allclose(found["place"][0], mean, rtol=2e-3)
