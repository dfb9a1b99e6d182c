"""The card beside exported weights: read as a hub reads it, and true of what it goes with."""

import json

import pytest
from conftest import call, refused

import export
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
    probe = {
        "headline": 0.414,
        "split": "val",
        "data": data,
        "command": "probe.py X",
    }
    (tmp_path / "run" / "probe.json").write_text(json.dumps(probe))
    (tmp_path / "run" / "metrics.json").write_text("{}")  # another program's
    call("export.py", "run", "--to", "mae", cwd=tmp_path, check=0)
    text = (tmp_path / "run" / "mae.md").read_text()
    assert f"license: {licence}" in text and data in text
    assert "| mask | `attn_high` |" in text and "| seed | `3` |" in text
    assert f"headline 0.414, val of {data}: `probe.py X`" in text


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


def test_a_folder_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no room")

    monkeypatch.setattr(export, "save_json", full_disk)  # behind the weights
    with pytest.raises(OSError, match="no room"):
        export.export(run, "hf", tmp_path / "hf")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    out, use = export.export(run, "hf", tmp_path / "hf")
    assert str(out) in use and (out / "config.json").exists() and list(tmp_path.iterdir()) == [out]
