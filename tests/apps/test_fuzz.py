"""Hundreds of bad calls, made from calls that work: no traceback, nothing lost, one line that says why.

    python -m pytest -m slow tests/apps/test_fuzz.py

A case is a call with one thing spoiled: a flag's value, a file that it reads, or what stood there
before. It has to end with status 0, or with status 2 and one line that begins with "error: ". No
file that was there may change, unless the call goes on with it, and nothing temporary may stay.
A call that breaks this is printed as a command line.
"""

import argparse
import os
import pickle
import random
import shlex
import shutil
import traceback
from collections import namedtuple
from pathlib import Path

import matplotlib.figure
import pytest
from conftest import LINUX, ROOT, call
from made import CPU, NANO, SIZE, files_of, home

import model

# lines of a shell, of which the last is judged; (file, how it is spoiled) or None; a telling word of
# the message, where it has to be refused
Case = namedtuple("Case", "lines spoiled word", defaults=(None, None))
SEED, OF_EACH = 0, 15  # cases of each call that works

TINY = f"--data datasets/packed --epochs 1 --batch-size 16 {CPU}"
PRE = f"pretrain.py {TINY} --model {NANO} --out runs/new"
MAPS = "apps.maps --data datasets/packed --device cpu"
ATTENTION = f"{MAPS} --map attn --run runs/a --out maps/new"
TUNE = f"finetune_lora.py runs/a --split val {TINY} --out runs/new"
NAME, PICTURE = f"apps.recognize runs/a-lora {CPU}", "images/class0/illust0_0.png"
UNKNOWN = f"apps.unknown runs/a-lora {CPU}"
PROBE = f"probe.py runs/a --data datasets/packed {CPU}"
STRESS = f"lab.stress runs/a --only cutout --images 8 {CPU}"
WORK = (  # calls that work, from which every bad one is made
    "data.py images --out datasets/new --size 32",
    "data.py list.csv --out datasets/new --size 32",
    "data.py images --out datasets/new --size 32 --crop figure:margin=0.3",
    f"{MAPS} --map saliency --out maps/new",
    ATTENTION,
    "mask.py --show block:size=0.5 attn_high --data datasets/packed --teacher runs/a --out new.png",
    PRE,
    f"{PRE} --mask fg_heavy --maps maps/packed",
    f"{PRE} --mask attn_high --teacher runs/a",
    f"{PRE} --init runs/a --contrast none",
    "pretrain.py --resume runs/a",
    f"apps.suspects runs/a --data datasets/packed --out suspects {CPU}",
    f"{PROBE} --headline",
    f"{TUNE} --method linear",
    f"{TUNE} --method lora",
    "finetune_lora.py --resume runs/a-lora --split test",
    f"{NAME} {PICTURE}",
    f"{NAME} {PICTURE} --detect runs/a-det",
    f"{NAME} --enrol newcomer images/class0",
    f"apps.sort runs/a-lora images/class0 --out sorted {CPU}",
    f"apps.learn runs/a-lora corrected {CPU}",
    f"{UNKNOWN} --split test",
    f"apps.tags runs/a --data datasets/packed --epochs 2 --out runs/new {CPU}",
    f"apps.tags runs/a-tags images/class0 {CPU}",
    f"apps.segment runs/a --data datasets/frames --out runs/new --epochs 1 --pixel-steps 1 {CPU}",
    f"apps.segment runs/a-seg {PICTURE} --out new {CPU}",
    f"apps.detect runs/a {TINY} --data datasets/scenes --view 48 --out runs/new",
    f"apps.detect runs/a-det {PICTURE} --out new {CPU}",
    "apps.export runs/a --to timm --out exports/timm.safetensors",
    "apps.export runs/a-lora --to merged --out exports/merged.safetensors",
    "apps.export runs/a-tags --to half --out exports/half",
    "ingest.toon --who yukina --size 32 --out new.png",
    "lab.run mine --arms block --data datasets/packed --threads 1 --dry",
    "lab.report study/minutes",
    STRESS,
)
LOST = (  # two calls, of which the second must not write over what the first has written
    ("apps.export runs/a --to mae --out x.st", "apps.export runs/a --to timm --out x.st"),
    ("apps.export runs/a --to mae", "apps.export runs/a --to mae --image-size 16"),
    (f"{PROBE} --headline", f"{PROBE} --headline --split dev"),
    (PROBE, f"{PROBE} --headline"),
    (f"{PROBE} --headline", f"{PROBE} --headline --data datasets/other"),
    (STRESS, f"{STRESS} --data datasets/other"),
    (STRESS, f"{STRESS} --split dev"),
    (UNKNOWN, f"{UNKNOWN} --split dev"),
    (UNKNOWN, f"{UNKNOWN} --data datasets/other"),
    (ATTENTION, f"{ATTENTION} --attention cls"),
)
pytestmark = LINUX  # whose file names may hold a line's end
HOW = ("gone", "empty", "half", "random", "pickle", "foreign", "text", "folder")
HOPELESS = ("nan", "inf", "-inf", "1e400", "1" + "0" * 30, "", " ", "½", "1e", "notes.txt", "--")
NUMBERS = (*HOPELESS, "-1", "0")
WORDS = "nan -1 ../../x {0}%s% ' ( a:b=c,d=nan ,,"
THERE = "notes.txt list.csv images datasets/packed runs/a runs/a-lora maps/packed study/table.md"
PATHS = "absent absent/deep/er notes.txt/under loop locked broken broken/half broken/evil.pt"
ODD = ("", " ", "ж\n名", "x" * 300, "odd/na\nme", "odd/名前 'q\" %s", "/dev/null/x")
TEXTS = (*ODD, *WORDS.split(), *THERE.split(), *PATHS.split())
LONG = {"compile", "help", "to"}  # flags that start long work, or none


# ---- the folder ----------------------------------------------------------------------------------


class Evil:
    """Unpickled, it would write a file."""

    def __reduce__(self):
        return (Path.write_text, (Path("owned"), "by a pickle"))


def spoil(path, how):
    """Put something else in the place of a file, as HOW says."""
    whole = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    new = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "random": random.Random(0).randbytes(max(64, len(whole))),
        "pickle": pickle.dumps(Evil()),
        "foreign": len(header).to_bytes(8, "little") + header + bytes(4),
        "text": 'nan, ж\n{"a": [1, null]}\n'.encode(),
    }
    if how == "folder":
        (path / "inside").mkdir(parents=True)
    elif how != "gone":
        path.write_bytes(new[how])


def write_more(base):
    """What must not be lost, odd names and broken files."""
    rows = shutil.ignore_patterns("table.*")
    published = ROOT / "results/baselines/minutes-faces20"
    shutil.copytree(published, base / "study/minutes", ignore=rows)
    for place in ("class0/0.png", "class1/1.png", "class1/2.png"):  # 1.png was moved
        (base / "corrected" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(base / f"images/class1/illust{place[-5]}_0.png", base / "corrected" / place)
    rows = [f"images/{i}.png,class0,0.5,0.5,class0/{i}.png" for i in (0, 1)]
    rows = [
        "picture,name,similarity,confidence,copy",
        *rows,
        "images/2.png,class1,1,1,class1/2.png",
    ]
    (base / "corrected/sorted.csv").write_text("\n".join(rows))
    for folder in ("odd", "broken", "temporary"):
        (base / folder).mkdir()
    for name in ("notes.txt", "study/table.md", "odd/na\nme", "odd/名前 'q\" %s", "locked"):
        (base / name).write_text("a,b\n1,what nobody wants to lose\n")
    (base / "locked").chmod(0)
    os.symlink("loop", base / "loop")
    for name, how in (("half", "half"), ("evil.pt", "pickle"), ("model.safetensors", "foreign")):
        shutil.copy(base / "runs/a/model.safetensors", base / "broken" / name)
        spoil(base / "broken" / name, how)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """The folder that calls work in; beside it, in home/, the same again."""
    base = tmp_path_factory.mktemp("fuzz") / "scratch"
    write_more(home(base.parent))
    with pytest.MonkeyPatch.context() as patch:
        save = lambda figure, path, **_: Path(path).write_bytes(os.urandom(8))  # noqa: E731
        patch.setattr(matplotlib.figure.Figure, "savefig", save)  # it takes half a second
        patch.setitem(model.SIZES, "nano", model.SIZES["nano"] | SIZE)
        patch.setattr("tempfile.tempdir", str(base / "temporary"))
        put_back(base)
        yield base


def put_back(base):
    """The folder as it was made."""
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(base.parent / "home", base, symlinks=True)


# ---- the cases -----------------------------------------------------------------------------------


def flags_of(stage):
    """The actions of a stage's parser, its positional arguments included."""
    found = {}

    def keep(parser):
        found["actions"] = parser._actions
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "format_help", keep)
        call(stage, "--help", cwd=ROOT, check=0)
    return [action for action in found["actions"] if action.dest not in LONG]


def values_of(action, rng):
    """Values for a flag, most of which do not fit; None: the flag alone."""
    if action.nargs == 0:
        return [None]
    if action.choices:
        return rng.sample(list(action.choices), 1)
    if getattr(action.type, "__name__", "") in ("number", "whole number"):
        return rng.sample(NUMBERS, 3)
    return rng.sample(TEXTS, 4)


def with_value(line, action, value):
    """The line with a flag, or the first positional argument, at a value -> a case."""
    if not action.option_strings:
        words = shlex.split(line)
        return Case([shlex.join([words[0], value, *words[2:]])])
    flag = action.option_strings[0]
    if value is None:
        return Case([f"{line} {flag}"])
    number = getattr(action.type, "__name__", "") in ("number", "whole number")
    word = flag if number and value in HOPELESS else None
    return Case([f"{line} {shlex.quote(f'{flag}={value}')}"], None, word)


def inputs_of(line, base):
    """The files that a line names, or that are in folders that it names; few of the pictures."""
    for word in shlex.split(line):
        path = base / word
        files = [path] if path.is_file() else [x for x in sorted(path.rglob("*")) if x.is_file()]
        pictures = [x for x in files if x.suffix == ".png"]
        yield from set(files) - set(pictures[2:])


def cases_of(line, base):
    """The bad calls that are made of one that works, always the same ones."""
    rng, found = random.Random(f"{SEED} {line}"), []
    for action in flags_of(line.split()[0]):
        found += [with_value(line, action, value) for value in values_of(action, rng)]
    for path in sorted(inputs_of(line, base)):
        spoiled = [(path.relative_to(base), how) for how in rng.sample(HOW, 2)]
        found += [Case([line], one) for one in spoiled]
    return [Case([line, line]), *rng.sample(found, min(OF_EACH, len(found)))]


# ---- what every call has to keep -----------------------------------------------------------------


def run_case(case, base):
    """-> the finished call of the last line, or the problem that reached the user as a traceback."""
    if case.spoiled:
        spoil(base / case.spoiled[0], case.spoiled[1])
    for line in case.lines[:-1]:
        call(*shlex.split(line), cwd=base)
    before = files_of(base)
    try:
        return call(*shlex.split(case.lines[-1]), cwd=base), before
    except BaseException as problem:
        return problem, before


def complaints_of_words(done, word):
    """What is wrong with the status and the message."""
    if isinstance(done, BaseException):
        place = traceback.extract_tb(done.__traceback__)[-1]
        yield f"{type(done).__name__}: {done} in {Path(place.filename).name}, line {place.lineno}"
        return
    lines = done.stderr.rstrip("\n").split("\n")
    errors = [line for line in lines if line.startswith(("error", "usage"))]
    if done.returncode not in (0, 2) or "Traceback" in done.stdout + done.stderr:
        yield f"status {done.returncode}: {done.stderr[-300:]}"
    if done.returncode == 2 and errors != lines[-1:]:
        yield f"refused in other words than one line: {done.stderr[-300:]!r}"
    if any("object at 0x" in error or "<_io" in error for error in errors):
        yield f"speaks to programmers: {errors}"
    if word and not (errors and word in errors[0]):
        yield f"does not refuse {word}: {errors}"


def complaints_of_files(done, before, base, line):
    """What is lost or left over."""
    goes_on = "--resume" in line and getattr(done, "returncode", 1) == 0
    grows = []
    if "--enrol" in line:
        grows = ["gallery.safetensors"]
    if "apps.learn" in line:
        grows = ["gallery.safetensors", "sorted.csv"]
    after = files_of(base)
    for path, content in before.items():
        if after.get(path) != content and not goes_on and path.name not in grows:
            yield f"changed {path.relative_to(base)}"
    there = [path for path in base.rglob("*") if path.suffix in (".tmp", ".lock")]
    for path in [*there, *(base / "temporary").iterdir()]:
        yield f"left {path.relative_to(base)}"
    if (base / "owned").exists():
        yield "ran code out of a pickle"


def complaints(case, base):
    """What is wrong with a case: lines, and the case for a shell; "" if it is as it should be."""
    done, before = run_case(case, base)
    line = case.lines[-1]
    found = [*complaints_of_words(done, case.word)]
    found += complaints_of_files(done, before, base, line)
    put_back(base)
    return "\n".join([*found, f"# spoiled: {case.spoiled}", *case.lines]) if found else ""


@pytest.mark.slow
@pytest.mark.parametrize("line", WORK)
def test_bad_calls(line, scratch):
    done = call(*shlex.split(line), cwd=scratch)
    put_back(scratch)
    assert not done.returncode, done.stderr
    failed = [*filter(None, [complaints(case, scratch) for case in cases_of(line, scratch)])]
    assert not failed, f"{len(failed)} calls:\n\n" + "\n\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), LOST)
def test_no_result_is_replaced_by_another(first, second, scratch):
    assert not complaints(Case([first, second]), scratch)


def test_every_stage_is_called():
    stages = {path.name for path in ROOT.glob("*.py")} - {"model.py"}
    mains = [path for path in ROOT.glob("apps/*.py") if "cli(main)" in path.read_text()]
    stages |= {f"apps.{path.stem}" for path in mains if path.stem != "demo"}
    assert stages <= {line.split()[0] for line in WORK}
