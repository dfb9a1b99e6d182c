"""apps/export.py: the same answers from onnxruntime as from torch, a reader without torch, and the card beside it."""

import csv
import json
import re
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, json_of, python, refused, run_line
from made import CPU, QUICK
from PIL import ExifTags, Image
from torch import nn

import data
import finetune_lora
from apps import export, tags
from common import checkpoints
from common.checkpoints import load_encoder, save_network
from common.train import UserError, save_safetensors, seeded
from ingest import toon
from model import MAE

TINY_MAE = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2}
TINY_MAE |= {"decoder_dim": 32, "decoder_depth": 1}


def model_of(path):
    """-> a function from pictures to a dict of outputs, and what the file says of itself."""
    model = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in model.get_outputs()]
    about = json.loads(model.get_modelmeta().custom_metadata_map["animask"])
    return lambda x: dict(zip(names, model.run(names, {"images": x.numpy()}), strict=True)), about


def pictures(B, S):
    return torch.randint(0, 256, (B, S, S, 3), dtype=torch.uint8, generator=seeded(0))


def near(found, expected):
    assert found.shape == tuple(expected.shape)
    assert np.allclose(found, expected.detach().numpy(), atol=1e-4, equal_nan=True)


def turn_and_clear(path, turned, clear):
    """A picture as a camera stores one that it held upright, and with its lower half transparent."""
    img, exif = Image.open(path), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    img.save(turned, exif=exif, quality=95)
    img.putalpha(Image.linear_gradient("L").resize(img.size))
    img.save(clear)


def said_without_torch(at, faces):
    """{picture: (name, similarity)}, by the reader that docs/checkpoints.md shows."""
    page = (ROOT / "docs/checkpoints.md").read_text().partition("## ONNX, without torch")[2]
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    (at / "who.py").write_text("import sys; sys.modules['torch'] = None\n" + code)
    said = python("who.py", "runs/a-lora/model.onnx", *faces, cwd=at, PYTHONPATH="")
    rows = re.findall(r"^(.*): (\S+), similarity (-?[\d.]+)$", said, re.M)
    return {picture: (name, float(similarity)) for picture, name, similarity in rows}


def test_a_changed_decoder_is_in_no_public_format_but_its_encoder_is(tmp_path, monkeypatch):
    mae = MAE(**TINY_MAE)
    mae.decoder.decoder_extra = nn.Linear(2, 2)
    save_network(mae, tmp_path / "model.safetensors", {})
    monkeypatch.setattr(checkpoints, "load_mae", lambda *_: (mae.eval(), {}))
    for to in (export.save_mae, export.save_hf):
        with pytest.raises(UserError, match="decoder_extra"):
            to(str(tmp_path), tmp_path / "out", None)
    export.save_timm(str(tmp_path), tmp_path / "timm.safetensors", None)
    assert (tmp_path / "timm.safetensors").exists()


def bias_alone(encoder, r=8, alpha=0.0):
    for name, w in encoder.named_parameters():
        w.requires_grad_(name.endswith("bias"))


def test_what_is_no_plain_lora_is_not_written_for_peft(at, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_lora, "add_lora", bias_alone)
    line = f"finetune_lora.py runs/a --split val --method lora:r=2 --out {tmp_path}/run {QUICK}"
    run_line(f"{line} --data datasets/packed", at, check=0)
    refused(run_line(f"apps.export {tmp_path}/run --to peft", at))
    assert not (tmp_path / "run/peft").exists()


@pytest.mark.slow
def test_a_recogniser_and_its_reader_without_torch(at):
    run_line(f"apps.recognize runs/a-lora {CPU} --enrol somebody images/class0", at, check=0)
    run_line("apps.export runs/a-lora --to onnx", at, check=0)
    ask, about = model_of(at / "runs/a-lora/model.onnx")
    assert about["names"] == ["class0", "class1", "class2", "somebody"] and about["learned"] == 3
    faces = [f"images/class{c}/illust9_0.png" for c in range(3)]
    faces += ["turned.jpg", "clear.png", "gray16.png"]
    turn_and_clear(at / faces[1], *faces[3:5])
    gray = np.array(Image.open(faces[1]).convert("L"), np.uint16)
    Image.fromarray(gray * 257).save(faces[5])
    found = said_without_torch(at, faces)
    for row in json_of(f"apps.recognize runs/a-lora {CPU} --json {' '.join(faces)}", at):
        name, similarity = found.pop(row["picture"])
        assert name == (row["name"] or "unknown")
        assert similarity == pytest.approx(row["similarity"], abs=3e-4)
    assert not found
    split = data.open_split("datasets/packed", "val")
    found = ask(torch.from_numpy(np.array(split["images"][:7])))
    assert found["who"].shape == (7,) and found["embedding"].shape == (7, 32)
    assert (np.isnan(found["confidence"]) == (found["who"] >= 3)).all()  # none of an enrolled one


@pytest.mark.slow
def test_an_encoder_and_a_tagger(at):
    """Of any number of pictures; an encoder also at another size."""
    run_line("apps.export runs/a --to onnx --out encoder.onnx --image-size 16", at, check=0)
    run_line("apps.export runs/a-tags --to onnx", at, check=0)
    encode, about = model_of(at / "encoder.onnx")
    assert about == {"is": "encoder", "side": 16}
    ask, about = model_of(at / "runs/a-tags/model.onnx")
    encoder = load_encoder("runs/a", 16)
    net, header = tags.load_tagger("runs/a-tags")
    assert about["tags"] == header["words"] and len(about["thresholds"]) == len(header["words"])
    for B in (1, 5):
        near(encode(pictures(B, 16))["tokens"], encoder.features(pictures(B, 16)))
        characters, probabilities = tags.answers(net, pictures(B, 32))
        found = ask(pictures(B, 32))
        near(found["tags"], probabilities)
        near(found["characters"], characters.softmax(1))


@pytest.mark.parametrize(
    ("to", "card", "library", "pictures", "licence"),
    [
        ("hf", "hf/README.md", "transformers", "toon", "mit"),
        ("mae", "mae.md", "pytorch", "mine", "other"),
        ("timm", "timm.md", "timm", "mine", "other"),
    ],
)
def test_a_hub_reads_the_card(tmp_path, to, card, library, pictures, licence):
    cards = pytest.importorskip("huggingface_hub")
    flags = {"data": f"datasets/{pictures}", "mask": "attn_high", "ratio": "0.75", "seed": 3}
    save_network(MAE(**TINY_MAE), tmp_path / "run/model.safetensors", {"run": flags})
    probe = {"headline": 0.414, "split": "val", "data": flags["data"], "command": "probe.py X"}
    (tmp_path / "run/probe.json").write_text(json.dumps(probe))
    (tmp_path / "run/metrics.json").write_text("{}")  # nothing in it
    said = run_line(f"apps.export run --to {to}", tmp_path, check=0).stdout
    found = cards.ModelCard.load(tmp_path / "run" / card)
    assert (found.data.library_name, found.data.license) == (library, licence)
    for line in said.split("load it  ")[1].splitlines():
        assert line in found.text
    assert "| mask | `attn_high` |" in found.text
    assert f"headline 0.414, val of datasets/{pictures}: `probe.py X`" in found.text


def test_a_card_names_the_pictures_of_the_encoder_that_a_run_began_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = {"mine": {}, "toon": {"init": "mine"}, "lost": {"init": "gone"}, "own": {"init": "own"}}
    for name, more in runs.items():
        flags = {"data": f"datasets/{name}", **more}
        save_network(MAE(**TINY_MAE), Path(name, "model.safetensors"), {"run": flags})
    text = export.card_of(Path("toon"), "pytorch", "")
    assert "license: other" in text and "(datasets/toon, datasets/mine)" in text
    for name in ("lost", "own"):  # its encoder is gone, or another run has its folder
        assert export.sets_behind(Path(name)) == [f"datasets/{name}", "not known here"]
    header = {"base": "mine", "run": {"data": "datasets/scenes", "encoder": "d4df7a6c05a8"}}
    save_safetensors({"x": torch.zeros(1)}, Path("det/detector.safetensors"), header)
    assert export.sets_behind(Path("det")) == ["datasets/scenes", "datasets/mine"]


def test_cards_of_a_merged_encoder_and_of_its_copy_say_how_it_was_trained(at):
    run_line("apps.export runs/a-lora --to merged --out merged.st", at, check=0)
    run_line("apps.export merged.st --to timm --out new/folder/copy.st", at, check=0)
    for card in ("merged.md", "new/folder/copy.md"):
        text = (at / card).read_text()
        assert "| mask of its encoder | `random` |" in text
    assert "Nothing was measured" in text


def test_a_folder_is_written_whole_or_not_at_all(at, tmp_path, monkeypatch):
    def full_disk(text, card):
        assert [*card.parent.iterdir()]  # all but the card
        raise OSError("no room")

    monkeypatch.setattr(export, "save_text", full_disk)
    line = f"apps.export runs/a-lora --to half --out {tmp_path}/half"
    with pytest.raises(OSError, match="no room"):
        run_line(line, at)
    assert not list(tmp_path.iterdir())


# ---- whoever loads it reads pictures as we do ----------------------------------------------------


def put_tall(two, path):
    upper, lower = two
    tall = Image.new("RGB", (200, 400))
    tall.paste(upper, (0, 0))
    tall.paste(lower, (0, 200))
    tall.save(path)
    return tall


def put_wide(two, path):
    put_tall(two, path).transpose(Image.Transpose.ROTATE_90).save(path)


def put_transparent(two, path):
    """The colours of one picture, seen through the bright parts of another."""
    two[0].putalpha(two[1].convert("L"))
    two[0].save(path)


def put_gray_with_alpha(two, path):
    gray = two[0].convert("L")
    gray.putalpha(two[1].convert("L"))
    gray.save(path)


def put_palette(two, path):
    put_tall(two, path).quantize(32).save(path, transparency=3)


def put_gray16(two, path):
    gray = np.array(put_tall(two, path).convert("L"), np.uint16)
    Image.fromarray(257 * gray).save(path)


def put_turned(two, path):
    """As a phone stores what it took on its side."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    put_tall(two, path).save(path, exif=exif)


PUT = {
    "tall": put_tall,
    "wide": put_wide,
    "square": lambda two, path: two[0].save(path),
    "gray": lambda two, path: put_tall(two, path).convert("L").save(path),
    "gray with alpha": put_gray_with_alpha,
    "transparent": put_transparent,
    "palette": put_palette,
    "gray16": put_gray16,
    "turned": put_turned,
}
BY_CARD = {"gray16", "turned"}  # what transformers' processor alone can't read


def code_of(card, path):
    """The lines of a card that read the picture a.png, for this one."""
    code = re.search(r"    # pictures.*?(?=\n\n\|)", card.read_text(), re.DOTALL)[0]
    return textwrap.dedent(code).replace('"a.png"', repr(str(path)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """weights/toon in three formats, as it is and at 128 px -> their folder."""
    at = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "write_onnx", lambda graph, notes, out: out.touch())
        for size in (96, 128):
            for to in ("hf", "mae", "onnx"):
                export.export(ROOT / "weights/toon", to, at / f"{to}{size}", size)
    return at


@pytest.mark.parametrize("size", [96, 128])
@pytest.mark.parametrize("kind", PUT)
def test_whoever_loads_an_export_gets_our_features(tmp_path, exported, kind, size):
    transformers = pytest.importorskip("transformers")
    people = toon.cast()[3:5]
    two = [Image.fromarray(toon.draw(toon.unseen(who, 1)[0], 200)["image"]) for who in people]
    PUT[kind](two, path := tmp_path / "x.png")
    encoder = load_encoder(ROOT / "weights/toon", size)
    cosine = partial(nn.functional.cosine_similarity, dim=2)
    with torch.no_grad():
        ours = encoder.features(data.read_view(path, size))
        known = {"transformers": transformers, "torch": torch, "np": np}
        exec(code_of(exported / f"hf{size}/README.md", path), known)
        given = [known["pixels"]]
        if kind not in BY_CARD:
            given.append(known["processor"](Image.open(path), return_tensors="pt").pixel_values)
        load = transformers.ViTMAEModel.from_pretrained
        net = load(exported / f"hf{size}", mask_ratio=0.0)
        order = torch.arange((size / 8) ** 2)[None]
        theirs = [net(pixels, noise=order).last_hidden_state for pixels in given]
        exec(code_of(exported / f"mae{size}.md", path), known)
        exec(code_of(exported / f"onnx{size}.md", path), known)
        views = known["view"][None] * 255, known["images"]
        theirs += [encoder.features(torch.from_numpy(view.round().astype("u1"))) for view in views]
        for tokens in theirs:
            assert cosine(tokens.mean(1, True), ours.mean(1, True)) > 0.998
            assert cosine(tokens, ours).mean() > 0.998


def test_timm_is_told_to_cut_nothing_from_the_centre(tmp_path):
    """timm itself is not asked: these are the fields that its documentation names."""
    export.export(ROOT / "weights/toon", "timm", tmp_path / "x.st", 128)
    card = (tmp_path / "x.md").read_text()
    for field in ("'crop_pct': 1.0", "'crop_mode': 'center'", "'interpolation': 'bicubic'"):
        assert field in card


# ---- the contract of WD taggers ------------------------------------------------------------------


def asked_as_by_others(folder, path):
    """Probabilities by name, computed as programs do that know WD taggers alone."""
    model = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    entry = model.get_inputs()[0]
    side = entry.shape[1]
    picture = Image.open(path).convert("RGB")
    square = Image.new("RGB", [max(picture.size)] * 2, (255, 255, 255))
    square.paste(picture, [(square.width - length) // 2 for length in picture.size])
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    [found] = model.run([model.get_outputs()[0].name], {entry.name: pixels[None, :, :, ::-1]})
    with open(folder / "selected_tags.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert entry.type == "tensor(float)" and found.shape == (1, len(rows))
    kinds = [row["category"] for row in rows]
    assert kinds == sorted(kinds, key="904".find)
    # As kohya's tagger and toriato's extension read it: four outputs are ratings, whatever the rows say;
    # general tags follow, and then characters.
    assert [row["name"] for row in rows[:4]] == list(export.RATINGS)
    behind = [(row["name"], row["category"]) for row in rows if row["category"] != "9"]
    assert not found[0][:4].any()  # the tests' tags have no rating
    return dict(zip(behind, found[0][4:], strict=True))


@pytest.mark.slow
def test_a_tagger_and_a_recogniser_answer_by_the_contract_of_wd_taggers(fresh, monkeypatch):
    """Sides of 96 and 32 px: Pillow resizes to a fourth or less in other steps."""
    monkeypatch.setattr(export, "WD_SIDE", 96)
    picture = Image.open(fresh / "images/class0/illust0_0.png").convert("RGB")
    picture.resize((96, 96), Image.Resampling.BICUBIC).save(fresh / "x.png")
    for run in ("a-tags", "a-lora"):
        run_line(f"apps.export runs/{run} --to wd", fresh, check=0)
    found = asked_as_by_others(fresh / "runs/a-tags/wd", fresh / "x.png")
    (row,) = json_of(f"apps.tags runs/a-tags x.png {CPU} --threshold 0 --json", fresh)
    for tag, p in row["tags"].items():
        assert found[tag, "0"] == pytest.approx(p, abs=1e-4)
    assert found[row["name"], "4"] == pytest.approx(row["confidence"], abs=1e-4)
    assert len(found) == len(row["tags"]) + 3
    found = asked_as_by_others(fresh / "runs/a-lora/wd", fresh / "x.png")
    (row,) = json_of(f"apps.recognize runs/a-lora {CPU} x.png --json", fresh)
    wanted = row["confidence"] if row["known"] else 0.0
    assert max(found.values()) == pytest.approx(wanted, abs=1e-4)
    assert "names nothing" in refused(run_line("apps.export runs/a --to wd --out wd", fresh))


class Constant(nn.Module):
    """Stands for a tagger: the same probability of each tag, whatever the picture."""

    def __init__(self, probabilities):
        super().__init__()
        self.tags = nn.Parameter(torch.tensor(probabilities))
        self.example = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)

    def forward(self, images):
        blank = 0 * images.flatten(1).float().mean(1, True)
        return {"tags": self.tags + blank, "characters": blank[:, :0]}


RATED = {  # the tags of a run, and the ratings by their place: the number of the tag, or 0
    "smile hat": [0, 0, 0, 0],
    "smile explicit hat general": [4, 0, 0, 2],
    "explicit questionable sensitive general": [4, 3, 2, 1],
    "Sensitive rating:general sensitive": [0, 3, 0, 0],
}


@pytest.mark.parametrize("words", RATED)
def test_the_first_four_outputs_for_wd_programs_are_ratings(tmp_path, monkeypatch, words):
    words, ratings = words.split(), RATED[words]
    numbers = [float(i) for i in range(1, len(words) + 1)]
    notes = {"is": "tagger", "tags": words, "names": []}
    graphs = []
    monkeypatch.setattr(export, "graph_of", lambda *_: (Constant(numbers), notes))
    monkeypatch.setattr(export, "write_onnx", lambda graph, *_: graphs.append(graph))
    export.save_wd("runs/x", tmp_path / "wd")
    found = graphs[0](graphs[0].example)["output"][0].tolist()
    assert found[:4] == ratings
    with open(tmp_path / "wd/selected_tags.csv", newline="") as file:
        names = [row["name"] for row in csv.DictReader(file) if row["category"] == "0"]
    assert dict(zip(names, found[4:], strict=True)) == {
        word: number
        for word, number in zip(words, numbers, strict=True)
        if word not in export.RATINGS
    }
