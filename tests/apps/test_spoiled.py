"""Valid files of every kind, of which one field is spoiled: an answer without NaN, or one line and status 2.

python -m pytest -m slow tests/apps/test_spoiled.py
"""

import copy
import json
import random
import traceback
import zipfile
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import some_view
from safetensors.torch import save_file
from test_poison import contents

import finetune_lora
from apps import detect, recognize, segment, tags
from common import command, fields, train
from common.checkpoints import init_from, load_encoder
from common.io import UserError
from ingest import sources
from ingest.pack import class_names
from ingest.tags import vocabulary
from model import MAE

SEED, DEEP = 0, "@deep"
CPU, VIEW = torch.device("cpu"), some_view(1)
SHAPE = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2}
SHAPE |= {"decoder_dim": 32, "decoder_depth": 1}
AUTOCAST = train.autocast_of(CPU, "fp32")
VALUES = {
    "null": None,
    "text": "$_$\x1b[2J\n\0",
    "long": "x" * 100_000,
    "negative": -1,
    "none": 0,
    "huge": 10**30,
    "nan": float("nan"),
    "true": True,
    "empty list": [],
    "empty table": {},
    "odd list": [-1, "a", None],
    "deep": DEEP,
}
TENSORS = ["gone", "nan", "infinite", "huge", "negative"]
TENSORS += ["empty", "flat", "further", "whole", "real"]


# ---- the files, and what reads them: a function of the folder -> plain values or a tensor ----------


@pytest.fixture(scope="module")
def home(base):
    """A home with a valid file of each kind. A case spoils one and puts it back."""
    steps(base / "runs/new")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)  # an adapter names its encoder as runs/a
        yield base


def steps(folder, resume=None):
    """A step of AdamW, a run that begins or is resumed, and another step -> where the run stands."""
    model = MAE(**SHAPE)
    optimizer = train.make_optimizer(model, 1e-3, 0.05)
    for w in model.parameters():
        w.grad = torch.ones_like(w)
    optimizer.step()
    flags = SimpleNamespace(out=str(folder), resume=resume, epochs=1, log=(), batch_size=1)
    run = train.Run(flags, {"model": model, "optimizer": optimizer}, 10**9, 1, CPU)
    run.resume_or_begin()
    optimizer.step()
    return run.step + run.seconds()


def use_encoder(base):
    init_from(MAE(**SHAPE | {"depth": 4}), base / "runs/a")
    encoder = load_encoder(base / "runs/a")
    return encoder.features(VIEW)


def use_recogniser(base):
    known = recognize.load_gallery(base / "runs/a-lora")
    net, header = finetune_lora.load_classifier(base / "runs/a-lora")
    found = recognize.embed(net, VIEW.numpy(), AUTOCAST)
    rows = recognize.answers(["x"], *found, known, 2)
    counts = torch.bincount(known["labels"], minlength=len(known["names"])).tolist()
    return [rows, [name in header["classes"] for name in known["names"]], counts]


def use_tagger(base):
    net, header = tags.load_tagger(base / "runs/a-tags")
    characters, found = tags.answers(net, VIEW)
    named = tags.named(found[0], header)
    return [header["classes"][characters.argmax()], named, characters.tolist(), found.tolist()]


def use_detector(base):
    net, header = detect.load(base / "runs/a-det")
    boxes, scores = detect.faces_of(net, VIEW[0].numpy(), header["page"], header["threshold"])
    return [boxes.tolist(), scores.tolist()]


def use_segmenter(base):
    return segment.pixel_masks(segment.load(base / "runs/a-seg")[0], VIEW, AUTOCAST)


def use_patches(base):
    net = segment.load_patches(base / "runs/a-seg/patches.safetensors")
    return segment.proxy_masks(net, VIEW, AUTOCAST)


FILES = {  # file: how many cases, and what reads it
    "runs/a/model.safetensors": (80, use_encoder),
    "runs/new/state.pt": (80, lambda base: steps(base / "runs/new", base / "runs/new")),
    "runs/a-lora/head.safetensors": (60, use_recogniser),
    "runs/a-lora/gallery.safetensors": (80, use_recogniser),
    "runs/a-lora/adapter_model.safetensors": (60, use_recogniser),
    "runs/a-lora/adapter_config.json": (60, use_recogniser),
    "runs/a-tags/model.safetensors": (80, use_tagger),
    "runs/a-seg/model.safetensors": (60, use_segmenter),
    "runs/a-seg/patches.safetensors": (40, use_patches),
    "runs/a-det/detector.safetensors": (60, use_detector),
}


def read(path):
    """-> its tensors, and its fields; of state.pt all are fields."""
    return contents(path) if path.suffix == ".safetensors" else ({}, contents(path))


def write(path, tensors, fields):
    if path.suffix == ".pt":
        return torch.save(fields, path)
    text = json.dumps(fields).replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000)
    if path.suffix == ".json":
        return path.write_text(text)
    save_file(tensors, path, {"animask": text})


# ---- what is spoiled -----------------------------------------------------------------------------


def places(fields, above=()):
    """The way to each field, those in tables and the first of a list, too."""
    if len(above) == 4:
        return
    items = fields.items() if isinstance(fields, dict) else enumerate(fields[:1])
    for key, value in items:
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places(value, (*above, key))


def cases(path, count):
    """-> [(what, where, how)], always the same."""
    tensors, fields = read(path)
    rng = random.Random(f"{SEED} {path.name}")
    ways = [way for way in places(fields) if way[0] != "optimizer"]  # torch's own
    found = list(product(["field"], ways, ("gone", *VALUES)))
    if path.suffix == ".pt":
        found += product(["tensor in"], ways, TENSORS[1:])
    rows = list(product(["tensor"], tensors, TENSORS))
    share = min(len(rows), count // 2)
    return rng.sample(rows, share) + rng.sample(found, min(len(found), count - share))


def spoiled(x, how):
    """A tensor, changed: in its last number, in its shape or in its kind."""
    if how in ("nan", "infinite"):
        x = x.float()
    value = {"nan": float("nan"), "infinite": float("inf"), "huge": 1e30, "negative": -1.0}
    if not x.is_floating_point():  # the largest and smallest whole numbers of its kind
        value |= {"huge": torch.iinfo(x.dtype).max, "negative": torch.iinfo(x.dtype).min}
    if how in value:
        x = x.clone()
        x.view(-1)[-1:] = value[how]
        return x
    empty = x[:0] if x.ndim else x.new_zeros(0)
    forms = {"empty": empty, "flat": x.flatten(), "further": x[None], "whole": x.long()}
    return forms.get(how, x.float())


def table_of(fields, way):
    """The table or list that holds the last field of the way."""
    for key in way[:-1]:
        fields = fields[key]
    return fields


def spoil(path, what, where, how):
    tensors, fields = read(path)
    if what == "tensor":
        x = tensors.pop(where)
        tensors |= {} if how == "gone" else {where: spoiled(x, how).contiguous()}
        return write(path, tensors, fields)
    at, key = table_of(fields, where), where[-1]
    if how == "gone":
        del at[key]
    elif what == "tensor in":
        at[key] = spoiled(at[key], how) if torch.is_tensor(at[key]) else at[key]
    else:
        at[key] = copy.deepcopy(VALUES[how])
    write(path, tensors, fields)


# ---- what every reader has to keep ---------------------------------------------------------------


def complaint(use, base):
    """What is wrong with an answer, or None."""
    try:
        with torch.no_grad():
            found = use(base)
        found = found.isfinite().all().item() if torch.is_tensor(found) else found
        assert found is not False, "an answer that is not finite"
        text = json.dumps(found, allow_nan=False, ensure_ascii=False)
        assert "\x1b" not in text, "a name that is not printable"
    except (UserError, OSError) as problem:  # common.command.cli makes a line of either
        return None if "\n" not in str(problem) else "more than one line"
    except BaseException as problem:  # whatever it is: it would reach the user as a traceback
        at = traceback.extract_tb(problem.__traceback__)[-1]
        return f"{type(problem).__name__}: {str(problem)[:150]} in {at.filename}, line {at.lineno}"


def judge(home, file, count):
    """Every case of a file, after the file as it is -> lines that say what went wrong."""
    failed, path = [], home / file
    _, use = FILES[file]
    use(home)
    whole = path.read_bytes()
    for case in cases(path, count):
        spoil(path, *case)
        if found := complaint(use, home):
            failed.append(f"{file}, {case}: {found}")
        path.write_bytes(whole)
    return failed


# ---- files that would take all memory, and names that are none ---------------------------------


def test_a_pth_that_is_larger_than_its_file_is_refused(tmp_path):
    weights = {"cls_token": torch.zeros(1, 1, 1).expand(1, 1, 10**10)}  # 40 GB in 1 kB
    torch.save(weights, tmp_path / "view.pth")
    with pytest.raises(UserError, match="larger than the file"):
        load_encoder(tmp_path / "view.pth")
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as old:
        files = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in files.items():
            new.writestr(name, content)
    for read_it in (load_encoder, train.load_state):
        with pytest.raises(UserError, match="packed"):
            read_it(tmp_path / "small.pth")


SLOW = {"(a+)+x" + "(.*)*" * 20 + "!": 2}  # a pattern, if somebody matched it
LARGE = (  # a file, the way to a field, a value that would take all memory or time, what is said
    ("runs/a-tags/model.safetensors", ("tags", "C"), 9_000_000, "C can't be"),
    ("runs/a-det/detector.safetensors", ("page",), 40_000, "page can't be"),
    ("runs/a-lora/head.safetensors", ("image_size",), 10**9, "image_size can't be"),
    ("runs/a-lora/head.safetensors", ("packed_size",), 30_000, "packed_size can't be"),
    ("runs/a-seg/model.safetensors", ("patches", "encoder", "depth"), 900, "claims"),
    ("runs/a-lora/adapter_config.json", ("alpha_pattern",), SLOW, "fits no layer"),
)


@pytest.mark.parametrize("file, way, value, words", LARGE)
def test_a_header_is_checked_before_it_is_believed(home, file, way, value, words, monkeypatch):
    whole, (tensors, header) = (home / file).read_bytes(), read(home / file)
    table_of(header, way)[way[-1]] = value
    write(home / file, tensors, header)
    if value is not SLOW:  # an adapter is compared with an encoder
        monkeypatch.setattr(torch.nn.Module, "__init__", None)  # nothing is built
    with pytest.raises(UserError, match=words):
        FILES[file][1](home)
    (home / file).write_bytes(whole)


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b", "\x1b[2J", "x" * 101, "\u202eb", "\ud800"])
def test_what_is_no_name_is_neither_packed_nor_enrolled(name):
    with pytest.raises(UserError, match="printable"):
        recognize.enrol(SimpleNamespace(enrol=name), None, {"classes": []}, None)
    with pytest.raises(UserError, match="printable"):
        class_names([sources.Record("a", "a", name)])
    records = [sources.Record("a", "a", "b", split="train", tags=(name, "hat"))] * 3
    assert vocabulary(records)[0] == ["hat"]
    assert fields.is_name("初音\u3000ミク $_$") and fields.shown("a\x1b\n") == "a\\x1b\\n"


def test_a_name_is_text_in_a_figure_and_a_figure_that_fails_is_a_line(tmp_path, capsys):
    from finetune_lora import draw_confusion

    draw_confusion(tmp_path / "c.png", [[1, 0], [0, 1]], ["$_$", "$\\frac$"], "$^$")
    assert (tmp_path / "c.png").stat().st_size
    with command.drawing("c.png"):
        raise RuntimeError("no\nfigure")
    assert capsys.readouterr().err == "note: c.png could not be drawn (no figure)\n"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_one_spoiled_field_is_an_answer_or_one_line(file, home):
    failed = judge(home, file, FILES[file][0])
    assert not failed, f"{len(failed)}:\n" + "\n".join(failed)
