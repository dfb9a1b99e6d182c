"""Bad input of the lesson's stages: one line with the value, exit status 2, and nothing is written."""

import shutil
import zipfile

import pytest
from conftest import call, draw_folder, refused

CPU = "--device cpu --dtype fp32"
PRE = f"pretrain.py --data packed --out new {CPU} --epochs 1 --batch-size 8"
TUNE = f"finetune_lora.py encoder --data packed --out new {CPU} --epochs 1 --batch-size 8"
PROBE = f"probe.py encoder --data packed {CPU}"
TABLE = (  # the command, and a word of its message
    (f"{PRE} --mask middle", "--mask middle is unknown"),
    (f"{PRE} --mask attn_high:betta=1", "no key 'betta'"),
    (f"{PRE} --mask attn_high:beta=wide", "'wide' must be a number"),
    (f"{PRE} --ratio 1.5", "--ratio 1.5"),
    (f"{PRE} --ratio .99999", "--ratio .99999"),
    (f"{PRE} --contrast 1", "pooler, cls, none"),
    (f"{PRE} --contrast none:weight=1", "no key 'weight'"),
    (f"{PRE} --model nano:simmim=1 --contrast pooler", "SimMIM"),
    (f"{PRE} --model huge", "--model huge is unknown"),
    (f"{PRE} --model nano:image_size=30", "30"),
    (f"{PRE} --model nano:heads=5", "heads"),
    (f"{PRE} --teacher nowhere --mask attn_high", "nowhere"),
    (f"{PRE} --teacher nowhere", "--teacher has no effect here"),
    (f"{PRE} --maps truth", "--maps has no effect here"),
    (f"{PRE} --attention cls", "--attention has no effect here"),
    (f"{PRE} --init encoder", "--init encoder"),
    (f"{PRE} --device tpu", "--device tpu"),
    (f"{PRE} --flat-weight nan", "--flat-weight nan"),
    (f"{PRE} --mask fg_heavy", "--map saliency"),
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
    ("pretrain.py --resume nowhere", "nowhere"),
    ("pretrain.py --resume encoder", "state.pt"),
    (f"{TUNE} --method adapters", "--method adapters is unknown"),
    (f"{TUNE} --method linear:r=8", "no key 'r'"),
    (f"{TUNE} --method lora:r=0", "rank"),
    (f"{TUNE} --head arcface:margin=x", "'x' must be a number"),
    (f"{TUNE} --head sphere", "--head sphere is unknown"),
    (f"{TUNE} --unfreeze-every 2", "--unfreeze-every has no effect here"),
    (f"{TUNE} --method linear --lr .1", "--lr has no effect here"),
    (f"{TUNE} --method linear --keep .5", "--keep has no effect here"),
    (f"{TUNE} --head ifa --pool cls", "--pool has no effect here"),
    (f"{TUNE} --keep .2:.5:1", "--keep"),
    (f"{TUNE} --keep .5:2", "between 0.01 and 1"),
    (f"{TUNE} --batch-size 1", "--batch-size 1"),
    ("finetune_lora.py --data packed", "ENCODER"),
    (f"{TUNE} --hold-out 2", "--hold-out 2"),
    (f"{TUNE} --split dev", "dev"),
    ("finetune_lora.py nowhere", "nowhere"),
    (f"{PROBE} --split dev", "dev"),
    (f"{PROBE} --out x", "--out has no effect here"),
    (f"{PROBE} --threshold 101", "--threshold 101"),
    (f"{PROBE} --pool grid", "--pool"),
    ("probe.py nowhere", "nowhere"),
    ("probe.py encoder", "--data"),
)


@pytest.fixture(scope="module")
def base(small, run, tmp_path_factory):
    base = tmp_path_factory.mktemp("refusals")
    shutil.copytree(small, base / "packed")
    shutil.copytree(run, base / "encoder")
    return base


@pytest.mark.parametrize("command, word", TABLE)
def test_bad_input_is_one_line(base, command, word):
    line = refused(call(*command.split(), cwd=base))
    assert word in line, line
    assert not any(p.name != ".lock" for p in (base / "new").rglob("*")), "something was written"


# ---- packing -------------------------------------------------------------------------------------

IMAGES, TOON = "data.py images --out new", "data.py toon --out new"
SPLITS, SHOW = "data.py splits --out new", "data.py --show images"
PACKING = (
    ("data.py nowhere --out new", "nowhere does not exist"),
    ("data.py --show nowhere", "--show nowhere"),
    ("data.py empty --out new", "no image found"),
    ("data.py text.txt --out new", "is no folder"),
    ("data.py nothing.zip --out new", "no image found"),
    ("data.py archives --out new", "but my_faces.zip lies there"),
    ("data.py broken --out new", "more than 5 %"),
    ("data.py unreadable --out new", "none of 2 images for"),
    ("data.py images --out packed", "rm -r packed"),
    ("data.py images --out text.txt", "text.txt is a file"),
    ("data.py images --out text.txt/set", "text.txt is a file"),
    ("data.py -", "give --out"),
    ("data.py notrain --out new", "brings test and val, but no train"),
    (f"{IMAGES} --size 0", "--size 0"),
    (f"{IMAGES} --split .5,.1", "--split .5,.1"),
    (f"{IMAGES} --split nan,0,0", "--split nan,0,0"),
    (f"{IMAGES} --split 1,nan,0", "--split 1,nan,0"),
    (f"{IMAGES} --split inf,0,0", "--split inf,0,0"),
    (f"{IMAGES} --split 2,-1,0", "--split 2,-1,0"),
    (f"{IMAGES} --group-by (", "--group-by ("),
    (f"{IMAGES} --group-by zz", "--group-by zz matches none"),
    (f"{IMAGES} --crop figure:margin=-1", "--crop figure:margin=-1"),
    (f"{IMAGES} --crop centre:margin=1", "no key 'margin'"),
    (f"{IMAGES} --crop figure:margin=nan", "must be a number"),
    (f"{IMAGES} --crop nose", "--crop"),
    (f"{IMAGES} --dedupe maybe", "--dedupe"),
    (f"{IMAGES} --keep-copies", "--keep-copies has no effect"),
    (f"{SPLITS} --dedupe --keep-copies", "--keep-copies has no effect"),
    (f"{SPLITS} --dedupe off --keep-copies", "--keep-copies has no effect"),
    (f"{IMAGES} --tail 6", "--tail 6"),
    (f"{IMAGES} --drawings 9", "--drawings has no effect"),
    (f"{IMAGES} --seed 99999999999999999999", "--seed 99999999999999999999"),
    (f"{IMAGES} --min-per-class 13", "--min-per-class 13 leaves nothing"),
    (f"{IMAGES} --layout split", "--layout split fits none of the 12 pictures"),
    (f"{IMAGES} --layout class/-/-/split", "fits none"),
    (f"{IMAGES} --layout a/b", "--layout a/b must be folder levels"),
    (f"{IMAGES} --layout class/class", "--layout class/class must be"),
    (f"{SPLITS} --split .8,.1,.1", "--split has no effect"),
    (f"{SPLITS} --dev .1", "--dev has no effect"),
    (f"{SPLITS} --seed 1", "--seed has no effect"),
    (f"{SPLITS} --test .5", "--test has no effect"),
    (f"{SHOW} --out x", "--out has no effect"),
    (f"{SHOW} --dev .1", "--dev has no effect"),
    (f"{SHOW} --seed 1", "--seed has no effect"),
    (f"{SHOW} --layout class", "--layout has no effect"),
    (f"{SHOW} --crop figure", "--crop has no effect"),
    ("data.py --show packed --detect", "--detect has no effect"),
    ("data.py --show toon", "--show"),
    ("data.py --show -", "--show"),
    (f"{TOON} --crop centre", "--crop has no effect"),
    (f"{TOON} --group-by ^a", "--group-by has no effect"),
    (f"{TOON} --dedupe", "--dedupe has no effect"),
    (f"{TOON} --keep-copies", "--keep-copies has no effect"),
    (f"{TOON} --layout class", "--layout has no effect"),
    (f"{TOON} --detect", "--detect has no effect"),
    ("data.py hybrid --out new --tail 1", "--tail has no effect"),
    ("data.py list.csv --out new --layout class", "--layout has no effect"),
    ("data.py bytes.csv --out new", "not a table in UTF-8"),
)
TABLES = (  # text of a list, and a word of the message
    ("a.png,x,nowhere", "line 1: split 'nowhere' is none of"),
    ("a.png,x,train\nb.png,y", "1 of 2 rows have no split"),
    ("a.png,x\na.png,x,train,t,more", "line 2 is not path,label,split,tags"),
    (",x", "line 1 is not path"),
    ("label,path\nx", "line 2 is not label,path"),
    ("", "no image found"),
)


@pytest.fixture(scope="module")
def sources(small, tmp_path_factory):
    """A folder with something of every kind that data.py refuses."""
    base = tmp_path_factory.mktemp("sources")
    shutil.copytree(small, base / "packed")
    draw_folder(base / "images", classes=2, each=6)
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
    (base / "text.txt").write_text("hello")
    (base / "list.csv").write_text("images/class0/illust0_0.png,x\n")
    (base / "bytes.csv").write_bytes(b"a.png,\xff\xfe\n")
    return base


@pytest.mark.parametrize("command, word", PACKING)
def test_bad_input_of_packing_is_one_line(sources, command, word):
    before = {path for path in sources.rglob("*") if path.suffix != ".lock"}
    line = refused(call(*command.split(), cwd=sources))
    assert word in line, line
    assert {path for path in sources.rglob("*") if path.suffix != ".lock"} == before


@pytest.mark.parametrize("text, word", TABLES)
def test_a_wrong_list_is_one_line(tmp_path, text, word):
    (tmp_path / "list.csv").write_text(text)
    assert word in refused(call("data.py", "list.csv", "--out", "out", cwd=tmp_path))
    assert not (tmp_path / "out").exists()
