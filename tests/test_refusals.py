"""Bad input of every stage: one line with the value, exit status 2, and nothing is written."""

import shlex
import shutil
import zipfile

import pytest
from conftest import call, draw_folder, refused
from made import CPU, QUICK, files_of, home

from common.io import read_safetensors, save_safetensors

PRE = f"pretrain.py --data datasets/packed --out new {CPU} --epochs 1 --batch-size 8"
TUNE = f"finetune_lora.py runs/a --data datasets/packed --out new {CPU} --epochs 1 --batch-size 8"
PROBE = f"probe.py runs/a --data datasets/packed {CPU}"
MAPS = "maps.py --data datasets/packed --out new"
NAME = f"recognize.py runs/a-lora {CPU}"
TAGS = f"tags.py runs/a --data datasets/packed --out new {QUICK}"
SEGMENT = f"segment.py runs/a --data datasets/frames --out new {CPU}"
DETECT = f"detect.py runs/a --data datasets/scenes --out new --view 48 {CPU}"
PLAN = "experiments.run --threads 1"
RUN = f"{PLAN} mine --data datasets/packed"
IMAGES, TOON = "data.py images --out new", "data.py toon --out new"
SPLITS, SHOW = "data.py splits --out new", "data.py --show images"
THREE = "images/class0/illust0_0.png images/class0/illust1_0.png images/class0/illust2_0.png"

REFUSED = (  # the command, and a telling word of its message
    (f"{PRE} --mask middle", "--mask middle is unknown"),
    (f"{PRE} --mask attn_high:betta=1", "no key 'betta'"),
    (f"{PRE} --mask attn_high:beta=wide", "'wide' must be a number"),
    (f"{PRE} --ratio 1.5", "--ratio 1.5"),
    (f"{PRE} --ratio .99999", "--ratio .99999"),
    (f"{PRE} --contrast 1", "pooler, cls, none"),
    (f"{PRE} --model nano:simmim=1 --contrast pooler", "SimMIM"),
    (f"{PRE} --model huge", "--model huge is unknown"),
    (f"{PRE} --model nano:image_size=30", "30"),
    (f"{PRE} --model nano:heads=5", "heads"),
    (f"{PRE} --teacher nowhere --mask attn_high", "nowhere"),
    (f"{PRE} --init runs/a", "--init runs/a"),
    (f"{PRE} --device tpu", "--device tpu"),
    (f"{PRE} --flat-weight nan", "--flat-weight nan"),
    (f"{PRE} --data datasets/other --mask fg_heavy", "--map saliency"),
    (f"{PRE} --mask parts", "--map parts"),
    (f"{PRE} --mask bg_heavy --maps truth", "foreground masks"),
    (f"{PRE} --mask random:throw=.5 --ratio .5", "thrown"),
    (f"{PRE} --mask random:shuffle=1", "'shuffle'"),
    (f"{PRE} --mask attn_high --contrast none --attention pooler", "--attention pooler"),
    (f"{PRE} --batch-size 1", "--batch-size 1"),
    (f"{PRE} --init nowhere", "nowhere"),
    (f"{PRE} --seed -1", "--seed -1"),
    (f"{PRE} --data=", "--data gives no"),
    (f"{PRE} --log mlflow", "mlflow"),
    (f"{PRE} --data nowhere", "nowhere"),
    (f"{PRE} --out runs/a", "is there already"),
    (f"{PRE} --out runs/a-lora", "runs/a-lora"),
    ("pretrain.py --resume nowhere", "nowhere"),
    ("pretrain.py --resume images", "state.pt"),
    (f"{TUNE} --method adapters", "--method adapters is unknown"),
    (f"{TUNE} --method linear:r=8", "no key 'r'"),
    (f"{TUNE} --method lora:r=0", "rank"),
    (f"{TUNE} --head arcface:margin=x", "'x' must be a number"),
    (f"{TUNE} --head sphere", "--head sphere is unknown"),
    (f"{TUNE} --keep .2:.5:1", "--keep"),
    (f"{TUNE} --keep .5:2", "between 0.01 and 1"),
    (f"{TUNE} --batch-size 1", "--batch-size 1"),
    (f"{TUNE} --hold-out 2", "--hold-out 2"),
    (f"{TUNE} --data plain --split dev", "dev"),
    ("finetune_lora.py nowhere", "nowhere"),
    ("finetune_lora.py --data datasets/packed", "ENCODER"),
    (f"{PROBE} --data plain --split dev", "dev"),
    (f"{PROBE} --threshold 101", "--threshold 101"),
    (f"{PROBE} --pool grid", "--pool"),
    ("probe.py nowhere", "nowhere"),
    (f"{MAPS} --map attn", "--run RUN"),
    (f"{MAPS} --map parts --run runs/a --parts 0", "--parts 0"),
    (f"{MAPS} --map attn --run runs/none", "runs/none"),
    (f"{MAPS} --map saliency --out text.txt/maps", "is a file"),
    (f"{MAPS} --map saliency --out maps/packed", "is there already"),
    (NAME, "give pictures"),
    (f"{NAME} {THREE} --threshold 2", "--threshold"),
    (f"{NAME} text.txt", "text.txt"),
    (f"{NAME} --verify images", "takes no pictures"),
    (f"{NAME} --enrol class0 {THREE}", "known already"),
    (f"{NAME} --enrol new images/class0/illust0_0.png", "too few"),
    (f"{NAME} --enrol new {THREE} text.png", "nobody was enrolled"),
    (f"{NAME} --enrol ' ' {THREE}", "no name"),
    (f"{NAME} {THREE} --detect runs/a/model.safetensors", "detect.py ENCODER makes it"),
    ("recognize.py runs/a-lora --forget nobody", "not enrolled"),
    ("recognize.py runs/a-lora --forget class1", "learned in training"),
    ("recognize.py runs/none images", "finetune_lora.py"),
    (f"{TAGS} --data datasets/frames", "has no tags"),
    (f"{TAGS} --data other-words", "val has other tags than train"),
    (f"{TAGS} --data bytes", "not int32"),
    (f"{TAGS} --data untagged", "val has no tags"),
    (f"{TAGS} --out runs/a-tags", "is there already"),
    (f"{SEGMENT} --out runs/a-seg", "is there already"),
    (f"{DETECT} --out runs/a-det", "is there already"),
    (f"{TAGS} --arm mfdn:share=.3", "no key 'share'"),
    (f"{TAGS} --epochs 1", "--epochs 1"),
    ("tags.py runs/a-tags --data datasets/packed", "is a run of tags.py"),
    ("tags.py runs/a images", "tags.py ENCODER"),
    ("tags.py runs/a-tags text.png", "not a picture"),
    ("tags.py runs/a --resume runs/a-tags", "--resume RUN"),
    (f"{SEGMENT} --data nowhere", "does not exist"),
    (f"{SEGMENT} --data datasets/packed", "no frames labelled 'photographed'"),
    (f"{SEGMENT} --network unet:depth=3", "no key 'depth'"),
    (f"{SEGMENT} --patches nowhere", "nowhere/patches.safetensors"),
    ("segment.py runs/a images", "segment.py ENCODER --data DIR makes it"),
    ("segment.py runs/a-seg nowhere.png", "nowhere.png"),
    (f"{DETECT} --data datasets/packed", "has no boxes"),
    (f"{DETECT} --view 40", "multiple of 16"),
    ("detect.py runs/a images", "detector.safetensors does not exist"),
    ("detect.py runs/none images", "does not exist"),
    ("detect.py odd.safetensors images", "detect.py ENCODER makes it"),
    ("detect.py runs/a-det images --crop", "--out DIR says where"),
    ("detect.py runs/a-det text.png", "not a picture"),
    ("export.py runs/a-lora --to onnx --image-size 64 --out new.onnx", "keeps the size"),
    ("export.py runs/a --to hf --out runs/a-lora", "is there already"),
    ("export.py runs/a --to mae --image-size 1000000 --out new.st", "1000000"),
    ("export.py images --to half", "is no run"),
    ("demo.py runs/none", "no run"),
    (f"{RUN} --arms nonsense", "nonsense"),
    (f"{RUN} --arms block:size=nonsense", "size"),
    (f"{RUN} --arms 'fg_heavy --maps truth'", "no true maps"),
    (f"{RUN} --set recipe", "NAME=VALUE"),
    (f"{RUN} --set split=test2", "test2"),
    (f"{PLAN} mine --data nowhere", "nowhere"),
    (f"{PLAN} adapt --data datasets/packed --set encoder=runs/none", "runs/none"),
    (f"{PLAN} detection --data datasets/packed --set encoder=runs/a", "data.py scenes"),
    (f"{PLAN} tags --data datasets/frames --set encoder=runs/a", "tags"),
    (f"{PLAN} hybrid --data datasets/packed --set encoder=runs/a", "drawn"),
    ("experiments.report images", "PLAN.json"),
    ("experiments.stress runs/a --only cutot", "cutot is unknown"),
    ("experiments.map_quality runs/a --data datasets/packed", "no true fg and parts"),
    ("data.py nowhere --out new", "nowhere does not exist"),
    ("data.py --show nowhere", "nowhere"),
    ("data.py empty --out new", "no image found"),
    ("data.py text.txt --out new", "is no folder"),
    ("data.py nothing.zip --out new", "no image found"),
    ("data.py archives --out new", "python data.py archives/my_faces.zip"),
    ("data.py broken --out new", "more than 5 %"),
    ("data.py unreadable --out new", "none of 2 images for"),
    ("data.py notrain --out new", "brings test and val, but no train"),
    ("data.py bytes.csv --out new", "not a table in UTF-8"),
    ("data.py images --out datasets/packed", "rm -r datasets/packed"),
    ("data.py images --out text.txt", "text.txt is a file"),
    ("data.py images --out text.txt/set", "text.txt is a file"),
    ("data.py -", "give --out"),
    ("data.py --show toon", "--show"),
    ("data.py --show -", "--show"),
    (f"{IMAGES} --size 0", "--size 0"),
    (f"{IMAGES} --split .5,.1", "--split .5,.1"),
    (f"{IMAGES} --split nan,0,0", "--split nan,0,0"),
    (f"{IMAGES} --split inf,0,0", "--split inf,0,0"),
    (f"{IMAGES} --split 2,-1,0", "--split 2,-1,0"),
    (f"{IMAGES} --group-by (", "--group-by ("),
    (f"{IMAGES} --group-by zz", "--group-by zz matches none"),
    (f"{IMAGES} --crop nose", "--crop"),
    (f"{IMAGES} --crop figure:margin=-1", "--crop figure:margin=-1"),
    (f"{IMAGES} --crop figure:margin=nan", "must be a number"),
    (f"{IMAGES} --crop centre:margin=1", "no key 'margin'"),
    (f"{IMAGES} --dedupe maybe", "--dedupe"),
    (f"{IMAGES} --tail 6", "--tail 6"),
    (f"{IMAGES} --seed 99999999999999999999", "--seed 99999999999999999999"),
    (f"{IMAGES} --min-per-class 25", "--min-per-class 25 leaves nothing"),
    (f"{IMAGES} --layout split", "--layout split fits none of the 72 pictures"),
    (f"{IMAGES} --layout a/b", "--layout a/b must be folder levels"),
    (f"{IMAGES} --layout class/class", "--layout class/class must be"),
)
IDLE = (  # the command, and flags that it would not read: each has no effect
    (f"{PRE} --mask random", "--teacher runs/a, --attention cls, --maps truth, --maps maps/packed"),
    (f"{PRE} --mask fg_heavy", "--teacher runs/a, --attention cls"),
    (f"{PRE} --mask detail", "--teacher runs/a, --maps truth"),
    (f"{PRE} --mask learned", "--teacher runs/a, --maps truth"),
    (f"{PRE} --mask attn_high", "--maps truth, --maps maps/packed"),
    (f"{PRE} --mask attn_low --teacher runs/a", "--maps maps/packed"),
    (f"{PRE} --mask squares", "--teacher runs/a"),
    (f"{TUNE} --method linear", "--lr .1, --unfreeze-every 1, --keep .5"),
    (f"{TUNE} --method lora", "--unfreeze-every 1"),
    (f"{TUNE} --method lora --head ifa", "--pool cls"),
    (PROBE, "--out new"),
    (f"{MAPS} --map saliency", "--attention cls, --parts 4, --run runs/a"),
    (f"{MAPS} --map attn --run runs/a", "--parts 4"),
    (f"{MAPS} --map parts --run runs/a", "--attention cls"),
    (f"{NAME} {THREE}", "--data datasets/packed, --split dev"),
    (f"{NAME} --verify", "--detect runs/a-det"),
    (f"{NAME} --enrol new {THREE}", "--data datasets/packed, --threshold .5, --json, --verify"),
    ("recognize.py runs/a-lora --list", "--device cpu, --json"),
    ("recognize.py runs/a-lora --forget class1", "--json"),
    (TAGS, "--json, --threshold .5"),
    (f"{TAGS} --arm tags", "--min-crop .5"),
    ("tags.py runs/a-tags images", "--arm vilt, --epochs 3, --data datasets/packed, --seed 1"),
    (SEGMENT, "--mixed"),
    (f"{SEGMENT} --patches runs/a-seg", "--epochs 2"),
    (DETECT, "--crop"),
    ("detect.py runs/a-det images", "--epochs 3"),
    ("experiments.stress runs/a --midterm", "--only cutout, --pool cls"),
    ("benchmarks.data --pack=4", "--images 999"),
    ("benchmarks.step --small", "--batch 999"),
    (IMAGES, "--drawings 9"),
    (SPLITS, "--split .8,.1,.1, --dev .1, --seed 1, --test .5"),
    (SHOW, "--out x, --dev .1, --seed 1, --layout class, --crop figure"),
    ("data.py --show datasets/packed", "--detect, --size 32, --min-per-class 2"),
    (TOON, "--crop centre, --group-by ^a, --dedupe, --layout class, --detect"),
    ("data.py hybrid --out new", "--tail 1"),
    ("data.py list.csv --out new", "--layout class"),
)


def of_idle():
    """IDLE as rows of REFUSED."""
    for command, flags in IDLE:
        for flag in flags.split(", "):
            yield f"{command} {flag}", f"{flag.split()[0]} has no effect"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A home, and something of every kind that data.py refuses."""
    base = home(tmp_path_factory.mktemp("refusals"))
    for i, split in enumerate(("train", "val", "test", "dev")):
        draw_folder(base / "splits" / split, classes=2, each=4, seed=i)
    for split in ("test", "val"):
        draw_folder(base / "notrain" / split, classes=2, each=4)
    for name, where, each in (("broken", "", 4), ("unreadable", "test", 2)):
        draw_folder(base / name / where, classes=1, each=each)
        for path in (base / name).rglob("*.png"):
            path.write_bytes(b"no image")
    draw_folder(base / "unreadable" / "train", classes=1, each=60)
    for folder in ("empty", "archives"):
        (base / folder).mkdir()
    (base / "archives" / "my_faces.zip").write_bytes(b"PK")
    with zipfile.ZipFile(base / "nothing.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name in ("text.txt", "text.png"):
        (base / name).write_text("hello")
    (base / "bytes.csv").write_bytes(b"a.png,\xff\xfe\n")
    weights, header = read_safetensors(base / "runs/a-det/detector.safetensors")
    save_safetensors(weights, base / "odd.safetensors", header | {"threshold": "high"})
    shutil.copytree(base / "datasets/packed", base / "plain")
    (base / "plain/dev.safetensors").unlink()
    spoil_tags(base)
    return base


def spoil_tags(base):
    """Packed sets whose tags are wrong in one way each."""
    for path in (base / "datasets/packed").iterdir():
        tensors, header = read_safetensors(path)
        tags, words = tensors["tags"], header["tags"]
        save_safetensors(tensors | {"tags": tags.byte()}, base / "bytes" / path.name, header)
        if path.stem == "val":
            words, tags = words[::-1], 0 * tags - 1
        save_safetensors(tensors, base / "other-words" / path.name, header | {"tags": words})
        save_safetensors(tensors | {"tags": tags}, base / "untagged" / path.name, header)


@pytest.mark.parametrize(("command", "word"), [*REFUSED, *of_idle()])
def test_bad_input_is_one_line(base, command, word):
    before = files_of(base)
    line = refused(call(*shlex.split(command), cwd=base))
    assert word in line, line
    assert files_of(base) == before, "something was written"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a.png,x,nowhere", "line 1: split 'nowhere' is none of"),
        ("a.png,x,train\nb.png,y", "1 of 2 rows have no split"),
        ("a.png,x\na.png,x,train,t,more", "line 2 is not path,label,split,tags"),
        (",x", "line 1 is not path"),
        ("label,path\nx", "line 2 is not label,path"),
        ("", "no image found"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path, text, word):
    (tmp_path / "list.csv").write_text(text)
    assert word in refused(call("data.py", "list.csv", "--out", "out", cwd=tmp_path))
    assert not (tmp_path / "out").exists()
