"""One process writes a folder, and a kill loses nothing: locks, two processes at once, kill -9 at many moments."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, call, draw_folder, refused
from PIL import Image

import data
import pretrain
import recognize
from common.checkpoints import save_model
from common.io import UserError, locked, read_safetensors
from common.train import load_state, read_log
from ingest import hybrid, pack, scenes
from model import MAE

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no locks on Windows")
CPU = ["--device", "cpu", "--dtype", "fp32"]
TUNE = ["--data", "packed", "--batch-size", 8, *CPU]
SMALL = ["--model", "nano:image_size=32,decoder_dim=32"]

# {name: (a call of each stage that writes, its lock)}; what it writes is under new/
STAGES = {
    "data": (["data.py", "images", "--out", "new/set", "--size", 16], "new/.set.lock"),
    "show": (["data.py", "--show", "new/packed"], "new/packed/.sheet.png.lock"),
    "maps": (
        ["maps.py", "--data", "packed", "--map", "saliency", "--out", "new/maps"],
        "new/maps/.saliency.safetensors.lock",
    ),
    "pretrain": (
        ["pretrain.py", *TUNE, *SMALL, "--epochs", 6, "--out", "new/run"],
        "new/run/.lock",
    ),
    "probe": (
        ["probe.py", "new/encoder", "--data", "packed", "--headline", *CPU],
        "new/encoder/packed-val/.probe-headline.json.lock",
    ),
    "finetune": (
        ["finetune_lora.py", "encoder", *TUNE, "--epochs", 6, "--out", "new/run"],
        "new/run/.lock",
    ),
    "tags": (["tags.py", "encoder", *TUNE, "--epochs", 6, "--out", "new/run"], "new/run/.lock"),
    "segment": (
        ["segment.py", "encoder", "--data", "frames", "--pixel-steps", 4, *CPU, "--out", "new/run"],
        "new/run/.lock",
    ),
    "detect": (
        ["detect.py", "wide", "--data", "scenes", "--view", 48, "--batch-size", 8, "--epochs", 2]
        + [*CPU, "--out", "new/run"],
        "new/run/.lock",
    ),
    "export": (
        ["export.py", "encoder", "--to", "hf", "--out", "new/hf"],
        "new/.hf.lock",
    ),
    "verify": (
        ["recognize.py", "new/lora", "--verify", "--data", "packed", "--split", "test", *CPU],
        "new/lora/packed-test/.recognize.json.lock",
    ),
}


@pytest.fixture(scope="module")
def home(tagged, tmp_path_factory):
    """A folder with what the calls of STAGES read."""
    root = tmp_path_factory.mktemp("home") / "home"
    shutil.copytree(tagged, root)
    torch.manual_seed(0)
    (root / "wide").mkdir()
    save_model(MAE(64, 8, 192, 2, 3, 32, 1), root / "wide/model.safetensors", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "COUNTS", {"train": 16, "dev": 4, "val": 4})
        few = {"train": (12, 4, 0), "dev": (2, 1, 1), "val": (3, 2, 2), "test": (1, 1, 1)}
        patch.setattr(hybrid, "COUNTS", few)
        pack.pack("hybrid", root / "frames", size=32)
        patch.setattr(pack, "render", drawn_here)
        pack.pack("scenes", root / "scenes", size=64)
    words = ("--method", "linear", "--epochs", 1, "--out", "lora")
    call("finetune_lora.py", "encoder", *TUNE, *words, cwd=root, check=0)
    call("recognize.py", "lora", "--list", cwd=root, check=0)
    return root


def drawn_here(records, draw, size, dims, *_):
    """pack.render without processes."""
    for record in records:
        row = draw(record.place, size)
        yield record, {p: (row | {"images": row["image"]})[p] for p in dims}


@pytest.fixture
def fresh(home):
    """The same folder, where new/ holds copies of what is written into."""
    renew(home)
    return home


def renew(home):
    shutil.rmtree(home / "new", ignore_errors=True)
    for name in ("packed", "encoder", "lora"):
        shutil.copytree(home / name, home / "new" / name)


def files_of(folder):
    """{path: bytes} of all files."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def started(words, cwd):
    """A stage in a process of its own."""
    command = [sys.executable, str(ROOT / words[0]), *map(str, words[1:])]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    """The process as `refused` and others read it."""
    out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def in_a_fork(function):
    """Run a function in a copy of this process -> how the copy ended: 0, or the signal."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


# ---- the lock ------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path):
    path = tmp_path / "run" / ".lock"
    with locked(path), pytest.raises(UserError, match="run is being written"), locked(path):
        pass
    assert not path.parent.exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    path = tmp_path / ".lock"

    def hold():
        with locked(path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(hold) == signal.SIGKILL and path.exists()
    with locked(path):
        assert path.exists()
    assert not path.exists()


def test_who_waits_for_a_lock_that_is_removed_gets_a_new_one(tmp_path):
    path, order = tmp_path / ".lock", []

    def wait(name):
        with locked(path, wait=True):
            order.append(name)
            assert path.exists()
            order.append(name)

    with locked(path):
        threads = [threading.Thread(target=wait, args=[i]) for i in range(8)]
        for thread in threads:
            thread.start()
        assert order == []
    for thread in threads:
        thread.join(20)
    assert order[::2] == order[1::2] and sorted(order[::2]) == list(range(8))
    assert not path.exists()


@pytest.mark.parametrize("name", STAGES)
def test_a_second_process_is_one_line_and_writes_nothing(fresh, name):
    words, lock = STAGES[name]
    with locked(fresh / lock):
        before = files_of(fresh)
        line = refused(call(*words, cwd=fresh))
        assert "is being written by another process" in line
        assert files_of(fresh) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_of_two_processes_on_one_folder_one_wins(fresh, name):
    both = [ended(p) for p in [started(STAGES[name][0], fresh) for _ in range(2)]]
    assert sorted(done.returncode for done in both) == [0, 2], [done.stderr for done in both]
    (loser,) = [done for done in both if done.returncode]
    lines = loser.stderr.splitlines()
    assert sum("error: " in line for line in lines) == 1 and "Traceback" not in str(lines)
    check_whole(fresh / "new")
    steps = [row["step"] for row in read_log(fresh / "new/run/log.jsonl")]
    assert steps == sorted(steps)
    assert not [p for p in fresh.rglob("*") if p.name.endswith((".lock", ".tmp"))]


# ---- what a shell left behind --------------------------------------------------------------------


def test_a_left_over_variable_of_torchrun_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "many")
    assert pretrain.start_processes(torch.device("cpu")) == (0, 1, torch.device("cpu"))
    assert "nowhere" in refused(call("probe.py", "nowhere", cwd=tmp_path))


def test_a_left_over_backend_of_matplotlib_is_ignored():
    code = "from common import plots; print(plots.plt.get_backend())"
    shell = os.environ | {"MPLBACKEND": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=shell, capture_output=True)
    assert done.stdout.lower().split() == [b"agg"], done.stderr


# ---- galleries -----------------------------------------------------------------------------------


def test_an_enrolment_meanwhile_is_not_lost(fresh, monkeypatch):
    """While one enrolment looks at its pictures, another is finished, as on the page."""
    pictures, predictions = sorted((fresh / "images/class0").iterdir())[:6:2], recognize.predictions

    def slow(*words):
        monkeypatch.setattr(recognize, "predictions", predictions)
        call("recognize.py", "new/lora", "--enrol", "second", *pictures, *CPU, cwd=fresh, check=0)
        return predictions(*words)

    monkeypatch.setattr(recognize, "predictions", slow)
    call("recognize.py", "new/lora", "--enrol", "first", *pictures, *CPU, cwd=fresh, check=0)
    assert recognize.load_gallery(fresh / "new/lora")["names"][-2:] == ["second", "first"]


@pytest.mark.slow
def test_of_enrolments_at_the_same_time_none_is_lost(fresh):
    pictures, names = sorted((fresh / "images/class0").iterdir())[:6:2], ["a", "b", "c", "d"]
    calls = [["recognize.py", "new/lora", "--enrol", n, *pictures, *CPU] for n in names]
    assert [ended(p).returncode for p in [started(words, fresh) for words in calls]] == [0] * 4
    assert sorted(recognize.load_gallery(fresh / "new/lora")["names"][-4:]) == names


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_while_a_gallery_is_written_leaves_it_whole(fresh, moment):
    known = recognize.load_gallery(fresh / "new/lora")
    faces, replace = torch.randn(3, known["embeddings"].shape[1]), os.replace

    def kill(*paths):
        if moment == "after":
            replace(*paths)
        os.kill(os.getpid(), signal.SIGKILL)

    def enrol():
        os.replace = kill
        recognize.add_faces(fresh / "new/lora", "new", ["a", "b", "c"], faces)

    assert in_a_fork(enrol) == signal.SIGKILL
    names = recognize.load_gallery(fresh / "new/lora")["names"]
    assert names == known["names"] + ["new"] * (moment == "after")
    recognize.add_faces(fresh / "new/lora", "other", ["d", "e", "f"], -faces)
    assert recognize.load_gallery(fresh / "new/lora")["names"] == [*names, "other"]
    assert not list((fresh / "new/lora").glob(".*"))


# ---- packing -------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from ingest import pack
source, out, moment, moves, count = *sys.argv[1:3], int(sys.argv[3]), {}, []

def move(name, paths):
    count.append(name)
    now = len(count) == moment // 2 + 1
    if now and moment % 2 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    moves[name](*paths)
    if now:
        os.kill(os.getpid(), signal.SIGKILL)

moves |= {"replace": os.replace, "rename": os.rename}
os.replace, os.rename = lambda *paths: move("replace", paths), lambda *paths: move("rename", paths)
pack.pack(source, out, size=16, seed=1)
"""


@pytest.mark.parametrize("moment", range(8))
def test_a_kill_while_packing_leaves_a_whole_set_or_none(tmp_path, moment):
    """Before or after each of the renames: of test, val and train, and of their folder."""
    images, out = draw_folder(tmp_path / "images"), tmp_path / "set"
    call("data.py", images, "--out", "old", "--size", 16, cwd=tmp_path, check=0)
    old = files_of(tmp_path / "old")
    command = [sys.executable, "-c", KILLED, str(images), str(out), str(moment)]
    done = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert files_of(tmp_path / "old") == old and out.exists() == (moment == 7)
    if moment < 7:
        call("data.py", images, "--out", out, "--size", 16, "--seed", 1, cwd=tmp_path, check=0)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "old", "set"]
    assert {p.stem for p in out.iterdir()} == {"train", "val", "test"}
    assert len(data.open_split(out, "val")["labels"]) > 0


# ---- kills at any moment -------------------------------------------------------------------------


def check_whole(folder):
    """Every file but temporary ones can be read."""
    for path in (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if path.suffix == ".safetensors":
            read_safetensors(path)
        elif path.suffix == ".pt":
            load_state(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_four_kills_of_each_stage_lose_nothing(fresh, name):
    """44 in all, at seeded moments of the seconds that the call takes."""
    words, rng = STAGES[name][0], random.Random(name)
    start_time = time.perf_counter()
    assert ended(started(words, fresh)).returncode == 0
    seconds = time.perf_counter() - start_time
    others = [p for p in files_of(fresh) if fresh / "new" not in p.parents]
    before = {p: p.read_bytes() for p in others}
    for _ in range(4):
        renew(fresh)
        process = started(words, fresh)
        time.sleep(rng.uniform(0.3, 1) * seconds)
        process.kill()
        ended(process)
        check_whole(fresh / "new")
        begun = (fresh / "new/run/state.pt").exists()
        again = [words[0], "--resume", "new/run"] if begun else words
        done = ended(started(again, fresh))
        if done.returncode:
            assert "is there already" in refused(done)
        else:
            assert not [p for p in fresh.rglob("*") if p.name.endswith((".lock", ".tmp"))]
        check_whole(fresh / "new")
        assert {p: p.read_bytes() for p in others} == before
