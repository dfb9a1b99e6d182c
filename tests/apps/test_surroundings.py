"""What a command finds around it: other processes, what a kill left, odd names, Windows."""

import errno
import gc
import os
import shutil

import numpy as np
import pytest
from conftest import ROOT, refused, run_line
from made import CPU, QUICK, files_of
from PIL import Image

from apps import export, maps, pictures, segment
from apps.pictures import file_name

# ---- after a kill --------------------------------------------------------------------------------

SEGMENT = f"apps.segment runs/a-seg images/class0/illust0_0.png images/class1 --out new {CPU}"
MAPS = "apps.maps --data datasets/packed --map saliency --device cpu --out new"
KILLED = {  # a call, and where it is killed: the module, its function, and how often that is called before
    "half": ("apps.export runs/a-lora --to half --out new", export, "save_text", 0),
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

    monkeypatch.setattr(maps.masks, "draw_sheet", lambda *_: None)  # it takes seconds
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
def test_no_command_replaces_what_it_has_open(fresh, windows, line, no_pictures, monkeypatch):
    monkeypatch.setattr(maps.masks, "draw_sheet", lambda *_: None)
    gc.disable()  # on Windows, nobody waits for it either
    try:
        run_line(line, fresh, check=0)
    finally:
        gc.enable()


# ---- folders that are only read, and other folders -----------------------------------------------


@pytest.fixture
def only_read(monkeypatch):
    """Nothing may be written in runs/, whoever asks: the tests may be root, whom no mode stops."""
    from pathlib import Path

    def refuses(how):
        def done(*words, **more):
            for word in map(str, words):
                if word.startswith("runs/"):
                    raise PermissionError(errno.EACCES, "Permission denied", word)
            return how(*words, **more)

        return done

    for name in ("replace", "rename", "mkdir"):
        monkeypatch.setattr(os, name, refuses(getattr(os, name)))
    is_free = os.access
    monkeypatch.setattr(
        os, "access", lambda path, how: is_free(path, how) and Path(path).parts[:1] != ("runs",)
    )


ONLY_READ = (  # the command, and the folder whose copy can be written
    ("apps.export runs/a --to timm", "cp -r runs/a NEW"),
    (f"probe.py runs/a --data datasets/packed {CPU}", "cp -r runs/a NEW"),
    (f"apps.recognize runs/a-lora {CPU} --enrol me images/class0", "cp -r runs/a-lora NEW"),
    (f"apps.unknown runs/a-lora {CPU}", "cp -r runs/a-lora NEW"),
)


@pytest.mark.parametrize(("line", "fix"), ONLY_READ)
def test_a_run_that_is_only_read_says_what_can_be_written(fresh, only_read, line, fix, no_pictures):
    said = refused(run_line(line, fresh))
    assert "may not be written by you" in said and fix in said


def test_a_run_that_is_only_read_still_names_pictures(fresh, monkeypatch, only_read):
    gallery = fresh / "runs/a-lora/gallery.safetensors"
    line = f"apps.recognize runs/a-lora {CPU} images/class1/illust0_0.png"
    known = run_line(line, fresh, check=0).stdout
    gallery.unlink()
    done = run_line(line, fresh, check=0)
    assert done.stdout == known and "is not kept" in done.stderr
    run_line("apps.export runs/a-lora --to half --out half", fresh, check=0)
    shutil.rmtree(fresh / "datasets")  # the copy has a gallery
    run_line(line.replace("runs/a-lora", "half"), fresh, check=0)
    assert not gallery.exists()


SHIPPED = (
    f"apps.recognize weights/toon-lora {CPU} x.png",
    f"apps.detect weights/toon-det {CPU} x.png",
    f"apps.tags weights/toon-tags {CPU} x.png",
    f"apps.segment weights/toon-seg {CPU} x.png --out new",
    "apps.export weights/toon --to hf",
    "apps.export weights/toon-lora --to half",
)


@pytest.mark.parametrize("line", SHIPPED)
def test_what_ships_is_found_from_every_folder_and_nothing_is_written_there(tmp_path, line):
    before = files_of(ROOT / "weights")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.png")
    run_line(line, tmp_path, check=0)
    assert files_of(ROOT / "weights") == before
    for card in tmp_path.rglob("README.md"):
        assert "license: mit" in card.read_text()


def test_a_run_of_ones_own_takes_no_gallery_of_what_ships(fresh):
    shutil.copytree("runs/a-lora", "weights/toon-lora")
    os.unlink("weights/toon-lora/gallery.safetensors")
    line = f"apps.recognize {{}} {CPU} images/class1/illust0_0.png"
    own, plain = (
        run_line(line.format(run), fresh, check=0) for run in ("weights/toon-lora", "runs/a-lora")
    )
    assert own.stdout == plain.stdout and "wrote weights" in own.stderr


ONE_NAME = (  # of pictures, where a disk knows no case
    ("x.png", "X.PNG"),
    ("Miku/1.png", "miku/1.webp", "MIKU/1.PNG"),
    ("a/x.png", "a/x.PNG", "a/X.png", "a/x.Png"),
    ("Straße.png", "STRASSE.png"),
)


@pytest.mark.parametrize("keys", ONE_NAME)
@pytest.mark.parametrize("in_folders", [False, True])
def test_pictures_keep_their_files_on_a_disk_without_case(tmp_path, monkeypatch, keys, in_folders):
    monkeypatch.setattr(pictures, "OWNERS", {})
    for _ in range(2):  # the second time as after a kill
        pictures.OWNERS.clear()
        for i, key in enumerate(keys):
            pictures.save_pngs(tmp_path, key, {"": np.full((2, 2, 3), i, "u1")}, in_folders)
    names = [str(path).casefold() for path in tmp_path.rglob("*.png")]
    assert len(set(names)) == len(keys) == len(names)


def test_in_a_notebook_each_command_has_plain_names(tmp_path, monkeypatch):
    for folder, key in (("a", "x.png"), ("b", "x.jpg")):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        pictures.save_pngs("out", key, {"": np.zeros((2, 2, 3), "u1")})
        assert (tmp_path / folder / "out/x.png").exists()


def test_names_of_files_are_those_of_every_system():
    names = ("Re:Zero", "is she?.png", "CON.png", "nul", "a. ", "ok.png")
    expected = ["Re_Zero", "is she_.png", "_CON.png", "_nul", "a_", "ok.png"]
    assert list(map(file_name, names)) == expected
