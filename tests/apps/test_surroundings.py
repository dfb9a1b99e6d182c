"""What a command finds around it: left-over variables, closed streams, odd names, other processes, what a kill left."""

import ast
import errno
import gc
import importlib
import os
import re
import shutil
import sys
import threading

import numpy as np
import pytest
from conftest import call, refused, run_line
from made import CPU, QUICK, files_of

from apps import captions, export, maps, segment
from common import plots
from common.command import cli
from common.io import UserError, atomic, move
from common.locks import locked
from ingest import pack
from ingest.pictures import file_name

OVER = {  # a call that would write over a finished run
    "tags": f"apps.tags runs/a --data datasets/packed {QUICK} --out runs/a-tags",
    "lora": f"finetune_lora.py runs/a --data datasets/packed --split val {QUICK} --out runs/a-lora",
    "segment": f"apps.segment runs/a --data datasets/frames {CPU} --out runs/a-seg",
    "detect": f"apps.detect runs/a --data datasets/scenes --view 48 {QUICK} --out runs/a-det",
}


@pytest.mark.parametrize("stage", OVER)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_variables_of_torchrun_that_are_left_over_give_no_run_away(base, stage, rank, monkeypatch):
    left = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    before = files_of(base)
    done = run_line(OVER[stage], base)
    assert done.returncode == 2 and "is there already" in done.stderr
    assert files_of(base) == before


@pytest.mark.parametrize("old", [None, "solo", "solo,\nlong hair,"])
def test_a_caption_that_two_processes_write_has_the_words_of_both(tmp_path, old, monkeypatch):
    file = tmp_path / "a.txt"
    if old:
        file.write_text(old)
    plain, others = captions.save_text, []

    def save(text, path):
        """Between reading and writing, another process comes."""
        monkeypatch.setattr(captions, "save_text", plain)
        others.append(threading.Thread(target=captions.add_caption, args=(file, ["second"])))
        others[0].start()
        others[0].join(0.2)
        plain(text, path)

    monkeypatch.setattr(captions, "save_text", save)
    captions.add_caption(file, ["first"])
    others[0].join()
    kept = [old.rstrip(",")] if old else []
    assert file.read_text() == ", ".join([*kept, "first", "second"])
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="nobody asks there whether a process lives")
def test_of_temporary_files_those_of_dead_processes_go_and_no_others(tmp_path):
    dead = tmp_path / ".a.txt.999999999.tmp"  # a number that no system gives
    names = ("mine", "1_0", "007", "-5", "old.999999999", "\u0663")
    own = [tmp_path / f".a.txt.{name}.tmp" for name in names]
    for path in (dead, *own):
        path.write_text("x")
    with atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
    assert not dead.exists() and all(path.exists() for path in own)


# ---- after a kill --------------------------------------------------------------------------------

SEGMENT = f"apps.segment runs/a-seg images/class0/illust0_0.png images/class1 --out new {CPU}"
MAPS = "apps.maps --data datasets/packed --map saliency --device cpu --out new"
KILLED = {  # a call, and where it is killed: the module, its function, and how often that is called before
    "half": ("apps.export runs/a-lora --to half --out new", export, "save_safetensors", 2),
    "maps": (MAPS, maps, "draw_sheet", 0),
    "masks": (SEGMENT, segment, "overlay", 1),
}


@pytest.mark.parametrize("case", KILLED)
def test_a_call_that_was_killed_is_given_again_and_leaves_nothing_else(fresh, case, monkeypatch):
    line, module, name, turns = KILLED[case]
    plain, calls = getattr(module, name), []

    def kill(*words, **options):
        calls.append(words)
        if len(calls) > turns:
            raise KeyboardInterrupt
        return plain(*words, **options)

    monkeypatch.setattr(maps.sheets, "draw_sheet", lambda *_: None)  # it takes seconds
    before = set(fresh.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(module, name, kill)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing up
        run_line(line, fresh, check=130)
    run_line(line, fresh, check=0)
    assert set(fresh.iterdir()) == before | {fresh / "new"} | {*fresh.glob("new.md")}
    assert not [path for path in (fresh / "new").rglob(".*") if path.name != ".lock"]


def test_a_mask_that_says_something_else_is_not_written_over(fresh):
    line = f"apps.segment runs/a-seg images/class0/illust0_0.png --out new {CPU}"
    run_line(line, fresh, check=0)
    first = files_of(fresh / "new")
    run_line(line, fresh, check=0)
    assert files_of(fresh / "new") == first
    path = next(iter(first))
    path.write_bytes(b"mine")
    assert "is there already" in refused(run_line(line, fresh))
    assert path.read_bytes() == b"mine"


# ---- streams, names, settings --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_stream_that_is_closed_reads_nothing_and_takes_everything(name, monkeypatch):
    """As a shell closes it: <&- or >&-."""
    monkeypatch.setattr(sys, name, None)

    def main():
        assert sys.stdin.read() == "" if name == "stdin" else getattr(sys, name).write("x") == 1

    cli(main)
    getattr(sys, name).close()


@pytest.mark.parametrize("script", ["pretrain.py", "apps.maps", "apps.unknown", "lab.bench_step"])
def test_a_command_has_its_help_without_docstrings(script, monkeypatch, tmp_path):
    """As under python -OO."""
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(module, "__doc__", None)
    assert "--device" in call(script, "--help", cwd=tmp_path, check=0).stdout


SETTINGS = {"text.usetex": True, "savefig.transparent": True, "figure.facecolor": "#000000"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_figure_looks_as_ours_do_whatever_a_matplotlibrc_says(tmp_path, setting):
    rows = [("a", np.zeros((1, 4, 4, 3), np.uint8))]
    plots.image_grid(tmp_path / "plain.png", "A title", rows)
    try:
        plots.plt.rcParams[setting] = SETTINGS[setting]
        importlib.reload(plots)  # as if it had been read when the command began
        plots.image_grid(tmp_path / "set.png", "A title", rows)
    finally:
        plots.plt.rcdefaults()
        importlib.reload(plots)
    assert (tmp_path / "set.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain.py", "--data", "datasets/packed", "--out", "runs/\udcff"],
        ["data.py", "images", "--out=datasets/\udce9t\udce9"],
        ["apps.tags", "runs/a-tags", "images", "--captions", "--prepend", "\udce3\udc82\udca2"],
        ["apps.recognize", "runs/a-lora", "images", "--enrol", "\udcff"],
    ],
)
def test_what_is_no_utf8_is_no_name_of_ours(base, words):
    before = files_of(base)
    assert "UTF-8" in refused(call(*words, cwd=base))
    assert files_of(base) == before


def test_a_folder_of_any_name_is_packed_under_a_name_that_is_text():
    assert pack.default_out("\udcff.zip").name == "\ufffd"


@pytest.mark.parametrize("name", ["back\\slash", "new\nline", "zero\u200bwidth", 'it\'s "it"'])
def test_the_line_that_loads_an_export_has_its_path(base, name):
    out = base / f"{name}.safetensors"
    words = ["apps.export", "runs/a-lora", "--to", "merged", "--out"]
    said = call(*words, out, cwd=base, check=0).stdout
    path = ast.literal_eval(re.search(r"load_encoder\((.*)\)", said)[1])
    assert path == str(out) and out.exists()
    out.unlink()
    out.with_suffix(".md").unlink()


@pytest.mark.parametrize("out", ["afile", "afile/run", "taken"])
def test_a_run_that_has_no_folder_is_told_so_before_the_folds_are_trained(base, out):
    (base / "afile").write_text("x")
    with locked(base / "taken/.lock"):
        said = refused(run_line(f"finetune_lora.py runs/a {QUICK} --out {out}", base))
    assert "is a file" in said or "is being written" in said


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_processes_that_cannot_start_are_not_a_set_that_cannot_be_written(
    tmp_path, number, monkeypatch
):
    """As where /dev/shm is not for us."""

    def start(*_, **__):
        raise OSError(number, "no semaphore")

    monkeypatch.setattr(pack, "ProcessPoolExecutor", start)
    with pytest.raises(UserError, match="no semaphore") as told, atomic(tmp_path / "set"):
        list(pack.render([], None, 16, {}))
    assert "set" not in str(told.value)


# ---- Windows, as far as another system can play it -----------------------------------------------


@pytest.fixture
def windows(monkeypatch):
    """No file is moved, or replaced, that this process has open or mapped."""
    from pathlib import Path

    def refuses(how):
        def moved(source, target):
            opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
            busy = Path("/proc/self/maps").read_text() + "\n".join(opened)
            for path in map(os.path.realpath, (source, target)):
                if path in busy:
                    raise PermissionError(f"{path} is in use")
            return how(source, target)

        return moved

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, refuses(getattr(os, name)))


NEW = (
    "apps.maps --data datasets/packed --device cpu --map saliency --out maps/new",
    "apps.recognize runs/a-lora --enrol somebody images/class0",
    f"finetune_lora.py runs/a --data datasets/packed --split val {QUICK} --out runs/new",
    f"probe.py runs/a --headline {CPU}",
)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux says what is mapped")
@pytest.mark.parametrize("line", NEW)
def test_no_command_replaces_what_it_has_open(fresh, windows, line):
    gc.disable()  # on Windows, nobody waits for it either
    try:
        run_line(line, fresh, check=0)
    finally:
        gc.enable()


def test_a_file_that_a_scanner_reads_for_a_moment_is_moved_later(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("common.io.time.sleep", waits.append)

    def busy(times, number):
        def how(source, target):
            if len(waits) < times:
                problem = PermissionError("busy")
                problem.winerror = number
                raise problem
            return source, target

        return how

    assert move(busy(3, 32), "a", "b") == ("a", "b") and waits == [0.05, 0.1, 0.2]
    waits.clear()
    with pytest.raises(PermissionError):
        move(busy(99, 5), "a", "b")
    assert len(waits) == 5
    waits.clear()
    with pytest.raises(PermissionError):
        move(busy(99, 17), "a", "b")
    assert not waits


def test_names_of_files_are_those_of_every_system():
    names = ("Re:Zero", "is she?.png", "CON.png", "nul", "a. ", "ok.png")
    expected = ["Re_Zero", "is she_.png", "_CON.png", "_nul", "a_", "ok.png"]
    assert list(map(file_name, names)) == expected
