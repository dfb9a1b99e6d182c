"""The card beside exported weights: read as a hub reads it, and true of what it goes with."""

import json

import pytest
from conftest import call, refused

from common.checkpoints import save_model
from model import MAE


@pytest.mark.parametrize(
    ("to", "name", "library"),
    [
        ("hf", "hf/README.md", "transformers"),
        ("mae", "mae.md", "pytorch"),
        ("timm", "timm.md", "timm"),
    ],
)
def test_a_hub_reads_the_card(run, tmp_path, to, name, library):
    cards = pytest.importorskip("huggingface_hub")
    out = tmp_path / ("hf" if to == "hf" else f"{to}.safetensors")
    said = call("export.py", run, "--to", to, "--out", out, cwd=tmp_path, check=0).stdout
    found = cards.ModelCard.load(tmp_path / name)
    assert found.data.library_name == library and found.data.license == "other"
    assert said.split("load it  ")[1].strip() in found.text and "Nothing was measured" in found.text


@pytest.mark.parametrize(
    ("data", "licence"), [("datasets/toon", "mit"), ("datasets/mine", "other")]
)
def test_a_card_tells_flags_figures_and_whose_pictures_they_were(tmp_path, data, licence):
    flags = {"data": data, "mask": "attn_high", "ratio": "0.75", "seed": 3}
    save_model(MAE(32, 8, 32, 2, 2, 32, 1), tmp_path / "run" / "model.safetensors", {"run": flags})
    rows = {
        name: {"logistic": {"top1": x}}
        for name, x in (("mean", 0.4), ("thumb4", 0.31), ("thumb8", 0.305))
    }
    probe = {
        "rows": rows,
        "headline": 0.414,
        "pool": "mean",
        "split": "val",
        "data": data,
        "command": "probe.py X",
    }
    (tmp_path / "run" / "probe.json").write_text(json.dumps(probe))
    filled = [
        {"strategy": "random", "ratio": r, "psnr": p} for r, p in ((0.5, 20.0), (0.75, 18.26))
    ]
    stress = {"reconstruction": filled, "split": "val", "data": data, "command": "stress X"}
    (tmp_path / "run" / "stress.json").write_text(json.dumps(stress))
    (tmp_path / "run" / "metrics.json").write_text("{}")  # another program's
    call("export.py", "run", "--to", "mae", cwd=tmp_path, check=0)
    text = (tmp_path / "run" / "mae.md").read_text()
    assert f"license: {licence}" in text and data in text
    assert "| mask | `attn_high` |" in text and "| seed | `3` |" in text
    assert (
        f"PSNR 18.3 dB of hidden pixels, three quarters hidden at random, val of {data}: `stress X`"
        in text
    )
    assert "Top-1 41.4% on val" in text and "(thumbnails: 31.0%): `probe.py X`" in text


def test_a_card_that_somebody_wrote_stays(run, tmp_path):
    (tmp_path / "mae.md").write_text("mine")
    words = ("export.py", run, "--to", "mae", "--out", tmp_path / "mae.safetensors")
    assert "mae.md" in refused(call(*words, cwd=tmp_path))
    assert (tmp_path / "mae.md").read_text() == "mine" and not (
        tmp_path / "mae.safetensors"
    ).exists()
    (tmp_path / "mae.md").unlink()
    call(*words, cwd=tmp_path, check=0)
    assert "Limits" in (tmp_path / "mae.md").read_text()
