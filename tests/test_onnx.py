"""export.py --to onnx: the same answers as torch for any number of pictures, and a reader without torch."""

import json
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, call, refused
from PIL import ExifTags, Image

import data
import export
import tags
from common.checkpoints import load_encoder

QUICK = ["--device", "cpu", "--dtype", "fp32"]


def model_of(path):
    """-> a function from pictures to a dict of outputs, and what the file says of itself."""
    model = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in model.get_outputs()]
    about = json.loads(model.get_modelmeta().custom_metadata_map["animask"])
    return lambda x: dict(zip(names, model.run(names, {"images": x.numpy()}), strict=True)), about


def pictures(B, S, seed=0):
    return torch.randint(
        0, 256, (B, S, S, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def turn_and_clear(path, turned, clear):
    """A picture as a camera stores one that it held upright, and with its lower half transparent."""
    img = Image.open(path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    img.save(turned, exif=exif, quality=95)
    img.putalpha(Image.linear_gradient("L").resize(img.size))
    img.save(clear)


def near(found, expected):
    assert found.shape == tuple(expected.shape)
    assert np.allclose(found, expected.detach().numpy(), atol=1e-4, equal_nan=True)


@pytest.fixture(scope="package")
def recogniser(small, run, tmp_path_factory):
    """A recogniser of three colours and of somebody who was enrolled, its folder."""
    out = tmp_path_factory.mktemp("onnx") / "run"
    call(
        "finetune_lora.py",
        run,
        "--data",
        small,
        "--method",
        "linear",
        "--out",
        out,
        *QUICK,
        cwd=out.parent,
        check=0,
    )
    faces = sorted((small.parent / "images" / "class0").iterdir())[:6]
    call(
        "recognize.py",
        out,
        "--enrol",
        "somebody",
        *faces,
        "--device",
        "cpu",
        cwd=out.parent,
        check=0,
    )
    return out


def test_an_encoder(run, tmp_path):
    done = call(
        "export.py",
        run,
        "--to",
        "onnx",
        "--out",
        tmp_path / "encoder.onnx",
        "--image-size",
        16,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "InferenceSession" in done.stdout, done.stderr
    net, _ = load_encoder(run, 16)
    ask, about = model_of(tmp_path / "encoder.onnx")
    assert about == {"is": "encoder", "side": 16}
    for B in (1, 5):
        near(ask(pictures(B, 16))["tokens"], net.features(pictures(B, 16)))
    assert "is there already" in refused(
        call("export.py", run, "--to", "onnx", "--out", tmp_path / "encoder.onnx", cwd=tmp_path)
    )


def test_a_recogniser_and_its_reader_without_torch(recogniser, small, tmp_path):
    call("export.py", recogniser, "--to", "onnx", cwd=tmp_path, check=0)
    assert "keeps the size" in refused(
        call(
            "export.py",
            recogniser,
            "--to",
            "onnx",
            "--image-size",
            64,
            "--out",
            tmp_path / "x.onnx",
            cwd=tmp_path,
        )
    )
    ask, about = model_of(recogniser / "model.onnx")
    assert about["names"] == ["class0", "class1", "class2", "somebody"] and about["learned"] == 3
    faces = [sorted((small.parent / "images" / f"class{c}").iterdir())[-1] for c in range(3)]
    faces += sorted((small.parent / "images" / "class0").iterdir())[:2]
    faces += [tmp_path / "turned.jpg", tmp_path / "clear.png"]
    turn_and_clear(faces[1], *faces[-2:])
    said = call("recognize.py", recogniser, *faces, "--json", *QUICK, cwd=tmp_path, check=0).stdout
    rows = [json.loads(line) for line in said.splitlines()]
    assert {row["best_guess"] for row in rows} == {
        "class1",
        "class2",
        "somebody",
    }  # who looks like class0
    text = re.search(
        r"```python\n(.*?)```", (ROOT / "docs" / "checkpoints.md").read_text(), re.DOTALL
    ).group(1)
    (tmp_path / "who.py").write_text("import sys; sys.modules['torch'] = None\n" + text)
    done = subprocess.run(
        [sys.executable, "who.py", recogniser / "model.onnx", *faces],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    for line, row in zip(done.stdout.splitlines(), rows, strict=True):
        name, similarity = re.fullmatch(r".*: (\S+), similarity (-?[\d.]+)", line).groups()
        assert (
            name == (row["name"] or "unknown") and abs(float(similarity) - row["similarity"]) < 3e-4
        )
    split = data.open_split(small, "val")
    found = ask(torch.from_numpy(np.array(split["images"][:7])))
    assert found["who"].shape == (7,) and found["embedding"].shape == (7, 32)
    sure = np.isnan(found["confidence"]) == (
        found["who"] >= 3
    )  # of an enrolled one there is no probability
    assert sure.all() and len(set(found["who"])) > 1


@pytest.mark.parametrize(
    "arm", ["mfdn", *(pytest.param(arm, marks=pytest.mark.slow) for arm in ("bce", "l2l"))]
)
def test_a_tagger(arm, tagged, tmp_path):
    call(
        "tags.py",
        "encoder",
        "--data",
        "packed",
        "--arm",
        arm,
        "--epochs",
        2,
        "--batch-size",
        8,
        *QUICK,
        "--out",
        tmp_path / "run",
        cwd=tagged,
        check=0,
    )
    call("export.py", tmp_path / "run", "--to", "onnx", cwd=tmp_path, check=0)
    ask, about = model_of(tmp_path / "run" / "model.onnx")
    net, header = tags.load_tagger(tmp_path / "run")
    assert about["tags"] == header["words"] and len(about["thresholds"]) == len(header["words"])
    for B in (1, 4):
        characters, probabilities = tags.answers(net, pictures(B, 32))
        found = ask(pictures(B, 32))
        near(found["tags"], probabilities)
        assert ("characters" in found) == (characters is not None)
        if characters is not None:
            near(found["characters"], characters.softmax(1))


def test_what_can_not_be_written_says_why(tagged, run, tmp_path, monkeypatch):
    call(
        "tags.py",
        "encoder",
        "--data",
        "packed",
        "--arm",
        "vilt",
        "--epochs",
        2,
        "--batch-size",
        8,
        *QUICK,
        "--out",
        tmp_path / "run",
        cwd=tagged,
        check=0,
    )
    line = refused(call("export.py", tmp_path / "run", "--to", "onnx", cwd=tmp_path))
    assert "--arm vilt, which names no tags" in line
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = refused(
        call("export.py", run, "--to", "onnx", "--out", tmp_path / "x.onnx", cwd=tmp_path)
    )
    assert (
        f"--to onnx needs onnxscript: {export.PIP}" in line and not (tmp_path / "x.onnx").exists()
    )
