"""Bad input of every stage: one line with the value, exit status 2, and nothing is written."""

import shlex
import shutil
import sys

import pytest
from conftest import ROOT, call, draw_folder, refused
from made import CPU, QUICK, files_of, home

from common.train import read_safetensors, save_safetensors

PRE = f"pretrain.py --data datasets/packed --out new {CPU} --epochs 1 --batch-size 8"
TUNE = f"finetune_lora.py runs/a --data datasets/packed --out new {CPU} --epochs 1 --batch-size 8"
PROBE = f"probe.py runs/a --data datasets/packed {CPU}"
MAPS = "apps.maps --data datasets/packed --out new"
MASKS = "apps.masks --data datasets/packed"
NAME = f"apps.recognize runs/a-lora {CPU}"
SORT = f"apps.sort runs/a-lora {CPU}"
UNKNOWN = f"apps.unknown runs/a-lora {CPU}"
TAGS = f"apps.tags runs/a --data datasets/packed --out new {QUICK}"
SEGMENT = f"apps.segment runs/a --data datasets/frames --out new {CPU}"
DETECT = f"apps.detect runs/a --data datasets/scenes --out new --view 48 {CPU}"
PLAN = "lab.run --threads 1"
RUN = f"{PLAN} mine --data datasets/packed"
HOLDS = "holds the pictures themselves"  # and nobody should be told to remove that
IMAGES, TOON = "data.py images --out new", "data.py toon --out new"
FACE = "ingest.toon --who yukina --size 16"
SPLITS, SHOW = "data.py splits --out new", "data.py --show images"
THREE = "images/class0/illust0_0.png images/class0/illust1_0.png images/class0/illust2_0.png"

REFUSED = (  # the command, and a telling word of its message
    (f"{PRE} --mask attn_high:betta=1", "no key 'betta'"),
    (f"{PRE} --mask attn_high:beta=wide", "'wide' must be"),
    (f"{PRE} --model nano:simmim=1 --contrast pooler", "SimMIM"),
    (f"{PRE} --model nano:image_size=30", "30"),
    (f"{PRE} --model nano:heads=5", "heads"),
    (f"{PRE} --model nano:decoder_depth=0", "at least 1"),
    (f"{PRE} --model nano:image_size=216,patch_size=108", "patch size 108"),
    (f"{PRE} --ratio 0.5:0.7:0.9", "0.7:0.9"),
    (PROBE.replace("runs/a", "runs/a runs/a"), "same flags and the same seed"),
    (PROBE.replace("runs/a", "runs/a moved/a"), "same flags and the same seed"),
    ("data.py images --out .", HOLDS),
    ("data.py images/class0 --out ../home/images", HOLDS),
    (f"apps.tags runs/a-tags images --captions --names {ROOT}/weights/toon-lora", "demo set alone"),
    (f"{TUNE} --method lora --from-scratch", "choose full"),
    ("apps.tags --resume weights/toon-tags", "give a run that has one"),
    (f"{PRE} --data datasets/other --mask fg_heavy", "--map saliency"),
    (f"{PRE} --mask parts", "--map parts"),
    (f"{PRE} --mask bg_heavy --maps truth", "foreground masks"),
    (f"{PRE} --mask random:throw=.5 --ratio .5", "thrown"),
    (f"{PRE} --mask random:shuffle=1", "'shuffle'"),
    (f"{PRE} --mask attn_high --contrast none --attention pooler", "--attention pooler"),
    ("pretrain.py --resume images", "state.pt"),
    ("pretrain.py --resume runs/a --teacher maps", "beside --resume"),
    (f"{TUNE} --method lora:r=0", "rank"),
    (f"{TUNE} --keep .2:.5:1", "--keep"),
    (f"{TUNE} --keep .5:2", "0.01"),
    (f"{TUNE} --data plain --split dev", "dev"),
    ("finetune_lora.py --data datasets/packed", "give an ENCODER"),
    ("apps.detect --data datasets/scenes", "give an ENCODER"),
    ("apps.segment --data datasets/frames", "give an ENCODER"),
    ("apps.tags --data datasets/packed", "give an ENCODER"),
    (f"{MAPS} --map attn", "--run RUN"),
    (f"{MASKS} nonsense", "nonsense is unknown"),
    (f"{MASKS} block:sise=1", "no key 'sise'"),
    (f"{MASKS} block:throw=.1", "throw"),
    (f"{MASKS} parts", "--map parts"),
    (f"{MASKS} learned", "during a run"),
    (f"{MASKS} parts learned", "--map parts"),
    (f"{MASKS} block --teacher runs/a", "--teacher has no effect"),
    (f"{MASKS} --out new", "masks.png"),
    (f"{MAPS} --map saliency --out text.txt/maps", "is a file"),
    (NAME, "give pictures"),
    (f"{NAME} {THREE} --threshold 3", "--threshold"),
    (f"{NAME} --list images", "takes no pictures"),
    (f"{UNKNOWN} images", "images"),
    (f"{NAME} --enrol new images/class0/illust0_0.png", "too few"),
    (f"{NAME} --enrol new {THREE.split()[0]} {THREE.split()[0]} {THREE.split()[1]}", "2 pictures"),
    (f"{NAME} --enrol new {THREE} text.png", "nobody was enrolled"),
    (f"{NAME} --enrol ' ' {THREE}", "no name"),
    (SORT, "--out"),
    (f"{SORT} --out new", "FOLDER"),
    (f"{SORT} images --out images/out", "choose another folder"),
    (f"{SORT} images --out runs/a", "new folder"),
    (f"{SORT} list.csv --out new", "unpack it"),
    (f"{SORT} nowhere --out new", "nowhere does not exist"),
    ("apps.recognize runs/a-lora --forget nobody", "not enrolled"),
    ("apps.recognize runs/a-lora --forget class1", "learned in training"),
    ("apps.recognize runs/none images", "finetune_lora.py"),
    ("apps.recognize other-encoder images", "not the encoder"),
    (f"{TAGS} --data datasets/frames", "has no tags"),
    ("apps.tags runs/a-tags --data datasets/packed", "is a run of apps/tags.py"),
    ("apps.tags runs/a images", "apps.tags ENCODER"),
    (f"apps.tags runs/a-tags twins/a.png twins/a.webp {CPU} --captions", "two pictures"),
    (f"{SEGMENT} --data datasets/packed", "no frames labelled 'photographed'"),
    ("apps.segment runs/a images", "apps.segment ENCODER --data DIR makes it"),
    (f"{DETECT} --data datasets/packed", "has no boxes"),
    (f"{DETECT} --view 40", "multiple of 16"),
    ("apps.detect runs/a images", "detector.safetensors does not exist"),
    ("apps.detect runs/a-det images --crop", "--out DIR says where"),
    ("apps.export runs/a-lora --to onnx --image-size 64 --out new.onnx", "keeps the size"),
    ("apps.export images --to half", "is no run"),
    ("apps.export runs/a --to timm --out .", "is there already"),
    ("probe.py runs/lr-0.001 --data datasets/packed", "--out runs/lr-0.001 makes one"),
    ("probe.py runs/a-det --data datasets/packed", "no encoder of its own"),
    ("finetune_lora.py runs/a --keep x", "invalid share value"),
    ("apps.demo runs/none", "no run"),
    (f"{RUN} --set recipe", "NAME=VALUE"),
    (f"{RUN} --arms 'block --seed=7'", "the plan gives --seed"),
    (f"{RUN} --set recipie=x", "recipie is unknown; mine has"),
    (f"{RUN} --set split=test2", "test2"),
    (f"{PLAN} ways --data datasets/packed --set encoder=runs/none", "runs/none"),
    ("lab.report images", "PLAN.json"),
    ("lab.map_quality runs/a --data datasets/packed", "no true fg and parts"),
    ("lab.subset datasets/packed --out new --characters 9", "has 3"),
    ("data.py nowhere --out new", "nowhere does not exist"),
    ("data.py empty --out new", "no image found"),
    ("data.py broken --out new", "3 of 40 images can't be read"),
    ("data.py unreadable --out new", "2 of 2 for new/test"),
    ("data.py -", "give --out"),
    (f"{FACE} --who nobody", "'nobody'"),
)
REPEATED = (  # the command, and what it refuses one by one: each is repeated in the message
    (PRE, "--mask nothing, --model huge, --ratio 1.5, --ratio .99999, --init runs/a"),
    (PRE, "--device tpu, --flat-weight nan, --batch-size 1"),
    (f"{PRE} --init", "nowhere"),
    (f"{PRE} --data", "nowhere"),
    (TUNE, "--method adapters, --head sphere, --batch-size 1, --hold-out 2"),
    ("finetune_lora.py", "nowhere"),
    (NAME, "text.txt"),
    (TAGS, "--epochs 1"),
    (f"{SEGMENT} --patches", "nowhere"),
    ("apps.segment runs/a-seg", "nowhere.png"),
    ("apps.export runs/a --to mae --out new.st --image-size", "1000000, 30"),
    (f"{RUN} --arms", "nonsense"),
    ("lab.stress runs/a --only", "cutot"),
    ("data.py --show", "nowhere"),
    (IMAGES, "--size 0, --split .5,.1, --split nan,0,0, --split inf,0,0, --split 2,-1,0"),
    (IMAGES, "--group-by (, --crop nose, --tail 6"),
    (IMAGES, "--seed 99999999999999999999, --group-by zz, --min-per-class 25, --layout split"),
    (IMAGES, "--layout a/b, --layout class/-/class, --layout split/split"),
    (FACE, f"--size 1000000, --seed {2**70}"),
)
TAKEN = (  # what would be written, and is there
    "data.py images --out runs",
    f"{PRE} --out runs/a",
    "apps.maps --data datasets/packed --map saliency",
    f"{TAGS} --out runs/a-tags",
    f"{SEGMENT} --out runs/a-seg",
    f"{DETECT} --out runs/a-det",
    "apps.export runs/a --to hf --out runs/a-lora",
    "apps.export runs/a --to mae --out text.st",  # text.md would be its card
    "lab.subset datasets/packed --out images",
    f"{FACE} --out text.png",
    "lab.dino --data datasets/packed --image-size 32 --out runs/a",
)
IDLE = (  # the command, and flags that it would not read: each has no effect
    (f"{PRE} --mask random", "--teacher runs/a, --attention cls, --maps truth, --maps maps/packed"),
    (f"{PRE} --mask fg_heavy", "--teacher runs/a, --attention cls"),
    (f"{PRE} --mask attn_high", "--maps truth, --maps maps/packed"),
    (f"{TUNE} --method linear", "--lr .1, --unfreeze-every 1, --keep .5"),
    (f"{TUNE} --method lora", "--unfreeze-every 1"),
    (f"{TUNE} --method lora --head ifa", "--pool cls"),
    (f"{TUNE} --balanced", "--logit-adjust 1"),
    (f"{MAPS} --map saliency", "--attention cls, --parts 4, --run runs/a"),
    (f"{MAPS} --map attn --run runs/a", "--parts 4"),
    (f"{MAPS} --map parts --run runs/a", "--attention cls"),
    (f"{NAME} --enrol new {THREE}", "--detect runs/a-det, --threshold .5, --json, --list"),
    ("apps.recognize runs/a-lora --list", "--device cpu, --json"),
    ("apps.recognize runs/a-lora --forget class1", "--json"),
    (TAGS, "--json, --threshold .5"),
    ("apps.tags runs/a-tags images", "--arm vilt, --epochs 3, --data datasets/packed, --seed 1"),
    (SEGMENT, "--mixed"),
    (f"{SEGMENT} --patches runs/a-seg", "--epochs 2"),
    (DETECT, "--crop"),
    ("apps.detect runs/a-det images", "--epochs 3"),
    ("lab.bench_step --small", "--batch 999"),
    (IMAGES, "--drawings 9, --characters 9"),
    (SPLITS, "--split .8,.1,.1, --dev .1, --seed 1, --test .5"),
    (SHOW, "--out x, --dev .1, --seed 1, --layout class, --crop figure"),
    (TOON, "--crop figure, --detect"),
    ("data.py list.csv --out new", "--layout class"),
)
ATTENTION = f"{MAPS} --map attn --run runs/a"
STRESS = f"lab.stress runs/a --only cutout --images 8 {CPU}"
LOST = (  # two calls, of which the second must not write over what the first has written
    ("apps.export runs/a --to mae --out x.st", "apps.export runs/a --to timm --out x.st"),
    (PROBE, f"{PROBE} --headline"),
    (f"{PROBE} --headline", f"probe.py runs/a --headline --data datasets/other {CPU}"),
    (STRESS, f"{STRESS} --split dev"),
    (UNKNOWN, f"{UNKNOWN} --data datasets/other"),
    (ATTENTION, f"{ATTENTION} --attention cls"),
)
LIBRARIES = (  # the command, and a library that it needs
    ("lab.convnets resnet10 --data datasets/packed --out new", "transformers"),
    ("apps.export runs/a --to onnx --out new.onnx", "onnxscript"),
    (DETECT, "pycocotools"),
)


def all_rows():
    """The tables, as rows of REFUSED."""
    yield from REFUSED
    for command, words in REPEATED:
        for word in words.split(", "):
            yield f"{command} {word}", word
    for command, flags in IDLE:
        for flag in flags.split(", "):
            yield f"{command} {flag}", f"{flag.split()[0]} has no effect"
    for command in TAKEN:
        yield command, "is there already"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A home, and something of every kind that a stage refuses."""
    base = home(tmp_path_factory.mktemp("refusals"))
    for i, split in enumerate(("train", "val", "test", "dev")):
        draw_folder(base / "splits" / split, classes=2, each=4, seed=i)
    for name, where, each in (("broken", "", 40), ("unreadable", "test", 2)):
        draw_folder(base / name / where, classes=1, each=each)
        for path in sorted((base / name).rglob("*.png"))[:3]:
            path.write_bytes(b"no image")
    draw_folder(base / "unreadable" / "train", classes=1, each=60)
    for folder in ("empty", "twins"):
        (base / folder).mkdir()
    for name in ("a.png", "a.webp"):
        shutil.copy(base / "images/class0/illust0_0.png", base / "twins" / name)
    for name in ("text.txt", "text.png", "text.md"):
        (base / name).write_text("hello")
    shutil.copytree(base / "runs/a", base / "moved/a")
    shutil.copytree(base / "datasets/packed", base / "plain")
    (base / "plain/dev.safetensors").unlink()
    adapt_to_another(base)
    return base


def adapt_to_another(base):
    """A recogniser whose encoder has other weights."""
    weights, header = read_safetensors(base / "runs/a/model.safetensors")
    other = {name: 2 * w for name, w in weights.items()}
    save_safetensors(other, base / "random/model.safetensors", header)
    shutil.copytree(base / "runs/a-lora", base / "other-encoder")
    weights, header = read_safetensors(base / "runs/a-lora/head.safetensors")
    save_safetensors(weights, base / "other-encoder/head.safetensors", header | {"base": "random"})


def times_of(folder):
    """When each file but locks was written."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize(("command", "word"), [*all_rows()])
def test_bad_input_is_one_line(base, command, word):
    before = times_of(base)
    line = refused(call(*shlex.split(command), cwd=base))
    assert word in line, line
    assert times_of(base) == before, "something was written"


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), LOST)
def test_no_result_is_replaced_by_another(fresh, no_pictures, first, second):
    call(*shlex.split(first), cwd=fresh, check=0)
    before = files_of(fresh)
    done = call(*shlex.split(second), cwd=fresh)
    assert not done.returncode or refused(done)
    assert before.items() <= files_of(fresh).items()


@pytest.mark.parametrize(("command", "library"), LIBRARIES)
def test_a_missing_library_is_named(base, command, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    line = refused(call(*shlex.split(command), cwd=base))
    assert library in line and "pip install" in line
    assert not list(base.glob("new*"))
    monkeypatch.delenv("CI", raising=False)  # where each library has to be there
    with pytest.raises(pytest.skip.Exception, match=library):  # a test that wants it to work
        call(*shlex.split(command), cwd=base, check=0)
