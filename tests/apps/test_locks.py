"""One process writes a folder, and a kill loses nothing: locks, two processes at once, kill -9 at many moments."""

import json
import random
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import LINUX, ROOT, draw_folder, python, refused, run_line, stopped
from made import CPU, NANO, files_of
from PIL import Image
from test_poison import differences, written

from apps import recognize
from apps.gallery import Gallery
from common.locks import locked
from common.train import UserError, read_safetensors

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no locks on Windows")
QUICK = f"--batch-size 8 --epochs 6 {CPU} --out new/run"
PRETRAIN = f"pretrain.py --data datasets/packed --model {NANO} --mask attn_high:start=.3 {QUICK}"
TUNE = f"finetune_lora.py runs/a --data datasets/packed --split val {QUICK}"
TAGS = f"apps.tags runs/a --data datasets/packed {QUICK}"
SEGMENT = f"apps.segment runs/a --data datasets/frames --pixel-steps 4 {QUICK}"
DETECT = f"apps.detect runs/a --data datasets/scenes --view 48 {QUICK}"
MAPS = "apps.maps --data datasets/packed --map saliency"
NAMES = f"apps.unknown runs/a-lora --split test {CPU}"
STAGES = [  # a call that writes what others may write at the same time, and its lock
    ("data.py images --out new/set --size 16", "new/.set.lock"),
    ("data.py --show datasets/packed", "datasets/packed/.sheet.png.lock"),
    (f"{MAPS} --out new/m", "new/m/.saliency.safetensors.lock"),
    ("apps.export runs/a --to hf --out new/hf", "new/.hf.lock"),
    (NAMES, "runs/a-lora/packed-test/.recognize.json.lock"),
]
ENROL = f"apps.recognize runs/a-lora {CPU} images/class0/illust0_0.png images/class0/illust1_0.png"
ENROL += " images/class0/illust2_0.png --enrol"


def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path):
    path = tmp_path / "run" / ".lock"
    with locked(path), pytest.raises(UserError, match="run is being written"), locked(path):
        pass
    assert not path.parent.exists()


def test_who_waits_for_a_lock_that_is_removed_gets_a_new_one(tmp_path):
    path, order = tmp_path / ".lock", []

    def wait(name):
        with locked(path, wait=True):
            order.append(name)
            assert path.exists()
            order.append(name)

    threads = [threading.Thread(target=wait, args=[i]) for i in range(8)]
    with locked(path):
        for thread in threads:
            thread.start()
        assert order == []
    for thread in threads:
        thread.join(20)
    assert order[::2] == order[1::2] and sorted(order[::2]) == list(range(8))
    assert not path.exists()


@pytest.mark.parametrize(("line", "lock"), STAGES)
def test_a_second_process_is_one_line_and_writes_nothing(fresh, line, lock):
    with locked(fresh / lock):
        before = files_of(fresh)
        assert "is being written by another process" in refused(run_line(line, fresh))
        assert files_of(fresh) == before


def test_an_enrolment_meanwhile_is_not_lost(fresh, monkeypatch):
    """While one enrolment looks at its pictures, another is finished, as on the page."""
    predictions = recognize.predictions

    def slow(*words):
        monkeypatch.setattr(recognize, "predictions", predictions)
        run_line(f"{ENROL.replace('class0', 'class1')} second", fresh, check=0)
        return predictions(*words)

    monkeypatch.setattr(recognize, "predictions", slow)
    run_line(f"{ENROL} first", fresh, check=0)
    monkeypatch.chdir(fresh)
    assert Gallery.load("runs/a-lora").names[-2:] == ["second", "first"]


AGAIN = "data.py images --out set --size 16 --seed 1"
MOVES = ("test", "val", "train", "their folder")  # of packing, one after the other
KILLED = """
import os, signal, sys
from ingest import pack

def pack_until(moment):
    moves, count = {"replace": os.replace, "rename": os.rename}, []

    def move(name, paths):
        count.append(name)
        now = len(count) == moment // 2 + 1
        if now and moment % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        moves[name](*paths)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = lambda *paths: move("replace", paths)
    os.rename = lambda *paths: move("rename", paths)
    os.chdir(str(moment))
    pack.pack("images", "set", size=16, seed=1)

for moment in range(int(sys.argv[1])):
    child = os.fork()  # what a process imports takes seconds
    if child == 0:
        pack_until(moment)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders 0 to 7: packing was killed before or after each of its moves."""
    folder = tmp_path_factory.mktemp("killed")
    for name in [str(moment) for moment in range(2 * len(MOVES))] + ["whole"]:
        draw_folder(folder / name / "images")
    run_line(AGAIN, folder / "whole", check=0)
    python("-c", KILLED, 2 * len(MOVES), cwd=folder)
    return folder


@pytest.mark.parametrize("moment", range(2 * len(MOVES)))
@LINUX
def test_a_kill_while_packing_leaves_a_whole_set_or_none(killed, moment):
    """The next call takes over what is left, also the lock."""
    folder, last = killed / str(moment), 2 * len(MOVES) - 1
    assert (folder / "set").exists() == (moment == last) and (folder / ".set.lock").exists()
    if moment < last:
        run_line(AGAIN, folder, check=0)
        assert sorted(path.name for path in folder.iterdir()) == ["images", "set"]
    whole = {path.name: path.read_bytes() for path in (killed / "whole/set").iterdir()}
    assert {path.name: path.read_bytes() for path in (folder / "set").iterdir()} == whole


LEARNED = "--mask learned:start=0,ramp_for=0,throw=.1 --ratio .5:.7"
TAUGHT = "--mask attn_high:start=0 --contrast cls:weight=.5"
FULL = "--method full --head curricularface --unfreeze-every 1 --keep .2:1"
STOPPED = {  # a call, and the steps in which it is stopped, one after the other
    f"{PRETRAIN} --epochs 2 {LEARNED}": (6,),
    f"{TUNE} --epochs 3 {FULL}": (2, 8),
    f"{TAGS} --epochs 2": (5,),
    f"{SEGMENT} --epochs 2 --pixel-steps 1 --batch-size 32": (1, 3),  # the second in stage 3
    f"{DETECT} --epochs 2 --method lora": (3,),
}
SELDOM = {
    f"{PRETRAIN} --epochs 2 {TAUGHT}": (6,),
    f"{TUNE} --epochs 3 --method linear": (3,),
    f"{TUNE} --epochs 3 --method lora --balanced --keep .5": (2, 8),
}
CUT = [*STOPPED.items()]
CUT += [pytest.param(*row, marks=pytest.mark.slow) for row in SELDOM.items()]


@pytest.mark.parametrize(("line", "steps"), CUT)
def test_a_run_that_was_stopped_ends_with_the_same_bits(fresh, line, steps, no_pictures):
    """It goes on where it was, by its own command or by --resume, and is judged on test."""
    run, whole = fresh / "new/run", fresh / "new/whole"
    run_line(line, fresh, check=0)
    run.rename(whole)
    resumed = f"{line.split()[0]} --resume new/run"
    for step, number in zip(steps, (signal.SIGTERM, signal.SIGINT), strict=False):
        with stopped(step, number):
            run_line(line, fresh, check=128 + number)
    with stopped(step):  # whatever began again would be stopped again
        run_line(resumed, fresh, check=0)
    found = differences(written(whole), written(run))
    assert {file for file, *_ in found} <= {"log.jsonl"}  # its rows are means since the last one
    if not line.startswith("pretrain.py"):
        other = "dev" if line.startswith("apps.detect") else "test"
        first = (run / "metrics.json").read_bytes()
        run_line(f"{resumed} --split {other}", fresh, check=0)
        assert (run / f"metrics-{other}.json").read_bytes() != first
        assert (run / "metrics.json").read_bytes() == first


READERS = {
    ".safetensors": read_safetensors,
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".json": lambda path: json.loads(path.read_text()),
    ".png": lambda path: Image.open(path).load(),
}


def check_whole(folder):
    """Every file but temporary ones can be read."""
    for path in folder.rglob("*.*"):
        if path.suffix in READERS and not path.name.startswith("."):
            READERS[path.suffix](path)


@pytest.mark.slow
@pytest.mark.parametrize("line", [PRETRAIN, TUNE, SEGMENT])
def test_a_kill_of_a_run_loses_nothing(fresh, line):
    """At a seeded moment after it begins to write; a run then ends with the bits of a whole one."""
    run, whole = fresh / "new/run", fresh / "new/whole"
    run_line(line, fresh, check=0)
    run.rename(whole)
    before, paths = files_of(fresh), set(fresh.rglob("*"))
    script, *words = shlex.split(line)
    process = subprocess.Popen([sys.executable, str(ROOT / script), *words], cwd=fresh)
    while process.poll() is None and set(fresh.rglob("*")) == paths:
        time.sleep(0.05)
    time.sleep(random.Random(line).uniform(0, 2))
    process.kill()
    process.wait()
    check_whole(fresh)
    done = run_line(line, fresh)
    assert not done.returncode or "has ended" in refused(done)
    assert done.returncode or not [*fresh.rglob("*.tmp")]
    check_whole(fresh)
    assert before.items() <= files_of(fresh).items()
    found = differences(written(whole), written(run))
    assert {file for file, *_ in found} <= {"log.jsonl"}
