"""Valid files of every kind, of which one field is spoiled: an answer without NaN, or one line and status 2.

python -m pytest -m slow tests/apps/test_spoiled.py
"""

import argparse
import contextlib
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

import data
import finetune_lora
from apps import detect, recognize, segment, tags
from common import command, features, fields, train
from common.checkpoints import init_from, load_encoder
from common.io import UserError, open_tensors
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


def use_set(base):
    """What pre-training, fine-tuning and a sheet read of a packed set."""
    folder = base / "datasets/packed"
    split = data.open_split(folder, "train")
    sets, names = features.open_subsets(folder, "val", 0)
    sizes = [len(data.groups_of(x.split)) for x in sets]
    return [names, sizes, sets[0].labels.tolist(), data.is_small(folder), data.fingerprint(split)]


FILES = {  # file: how many cases, and what reads it
    "datasets/packed/train.safetensors": (80, use_set),
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
    items = fields.items() if isinstance(fields, dict) else enumerate(fields[:2])
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


# ---- what no file may claim ----------------------------------------------------------------------


@pytest.fixture
def one(home):
    """one(file) -> its path; the file is as it was at the end of the test."""
    kept = {}

    def keep(file):
        kept[home / file] = (home / file).read_bytes()
        return home / file

    yield keep
    for path, content in kept.items():
        path.write_bytes(content)


def shift(head, name, by):
    head[name]["data_offsets"] = [x + by for x in head[name]["data_offsets"]]


@pytest.mark.parametrize(
    ("what", "spare"),
    [
        (lambda head: shift(head, "labels", 8), 8),
        (lambda head: shift(head, "labels", -8), 0),
        (lambda head: shift(head, "images", 1), 0),
        (lambda head: head["images"].update(shape=[18, 64, 32, 3]), 8),
        (lambda head: head.update(more=head["labels"]), 0),
    ],
)
def test_tensors_fill_their_file_without_gaps_and_overlaps(one, what, spare):
    path = one("datasets/packed/train.safetensors")
    content = path.read_bytes()
    room = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(content[8:room])
    what(head)
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[room:] + bytes(spare))
    with pytest.raises(UserError, match="not a whole file"):
        open_tensors(path)


def test_a_file_that_may_not_be_read_is_not_called_broken(one, monkeypatch):
    path = one("datasets/packed/train.safetensors")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may read all
    with pytest.raises(UserError, match="may not be read by you"):
        open_tensors(path)


@pytest.mark.parametrize("method", ["LoRA", "x", "full", "linear", ""])
def test_no_header_hides_an_adapter(one, home, method):
    net, _ = finetune_lora.load_classifier("runs/a-lora")
    path = one("runs/a-lora/head.safetensors")
    tensors, header = read(path)
    write(path, tensors, header | {"method": method})
    with contextlib.suppress(UserError):
        other, _ = finetune_lora.load_classifier("runs/a-lora")
        assert torch.equal(net.encoder.features(VIEW), other.encoder.features(VIEW))


@pytest.mark.parametrize(
    "odd",
    [
        {"classes": [0, 1, 2]},
        {"classes": ["", "a", "b"]},
        {"classes": ["a", "a", "b"]},
        {"classes": ["\x1b[2J", "a", "b"]},
        {"classes": "abc"},
        {"groups": ["a"]},
        {"groups": list(range(36))},
        {"keys": [None] * 36},
        {"style": 3},
    ],
    ids=str,
)
def test_a_set_with_odd_names_is_not_opened(one, home, odd):
    path = one("datasets/packed/train.safetensors")
    tensors, header = read(path)
    write(path, tensors, header | odd)
    for open_it in (
        lambda: data.open_split(path.parent, "train"),
        lambda: data.is_small(path.parent),
    ):
        with pytest.raises(UserError, match=next(iter(odd))):
            open_it()


@pytest.mark.parametrize("wrong", [torch.uint64, torch.uint32, torch.int32])
def test_a_kind_of_number_is_no_part_of_a_word(one, home, wrong):
    path = one("runs/a-lora/gallery.safetensors")
    tensors, header = read(path)
    write(path, tensors | {"labels": tensors["labels"].to(wrong)}, header)
    with pytest.raises(UserError, match="labels is"):
        recognize.load_gallery("runs/a-lora")


@pytest.mark.parametrize("words", ["--seed 1 --seed 2", "--seed=1 --lr 1 --seed 1", "--no-x --x"])
def test_a_flag_is_given_once(words):
    parser = command.Parser()
    parser.add_argument("--seed", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--x", action=argparse.BooleanOptionalAction)
    parser.add_argument("pictures", nargs="*")
    assert parser.parse_args(["--seed", "1", "--", "--seed"]).pictures == ["--seed"]
    with pytest.raises(UserError, match="twice"):
        parser.parse_args(words.split())


@pytest.mark.parametrize("value", [0.0, 2.66, -1.2, 1.5e-4])
def test_a_head_that_is_equally_sure_of_all_pictures_lifts_none(value):
    logits = torch.full((20, 3), value)
    logits[::2] += 1e-6  # rounding
    lift = recognize.lift_of(logits)
    asked = recognize.lifted(torch.tensor([0.2, 0.9]), torch.tensor([50.0, -50.0]), lift)
    assert torch.equal(asked, torch.tensor([0.2, 0.9]))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_one_spoiled_field_is_an_answer_or_one_line(file, home):
    failed = judge(home, file, FILES[file][0])
    assert not failed, f"{len(failed)}:\n" + "\n".join(failed)
