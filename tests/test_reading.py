"""What a student has to read for `python pretrain.py --mask attn_high --ratio 0.75`, counted."""

import ast
import sys
import threading
from pathlib import Path

from conftest import ROOT, call

import data
import pretrain
from common.train import Meter

SURROUNDINGS = {
    "common.plots",
    "common.metrics",
    "ingest.toon",
}  # pictures, metrics and the painter are not counted
STEP = [
    "--mask",
    "attn_high:start=.3",
    "--ratio",
    ".75",
    "--image-size",
    32,
    "--patch-size",
    8,
    "--batch-size",
    16,
    "--epochs",
    3,
    "--decoder-depth",
    1,
    "--device",
    "cpu",
]


def length(node):
    """Lines of a function, its decorators included."""
    return node.end_lineno - first_line(node) + 1


def first_line(node):
    return min([node.lineno, *[d.lineno for d in node.decorator_list]])


def functions(path):
    """{(name, first line): lines} of the functions of a file."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    return {(n.name, first_line(n)): length(n) for n in nodes}


def code_lines(path):
    """Lines of a file without the empty ones, comments and docstrings."""
    text, words = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and body
        if has_docstring and isinstance(body[0], ast.Expr):
            words |= set(range(body[0].lineno, body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        1
        for i, line in lines
        if line.strip() and not line.strip().startswith("#") and i not in words
    )


def our_files():
    """Every module of ours, tests and what a virtual environment brings left out."""
    words = {p: p.relative_to(ROOT).parts for p in ROOT.rglob("*.py")}
    return [
        p
        for p, w in words.items()
        if w[0] not in ("tests", "runs") and not any(x.startswith(".") for x in w)
    ]


def imported_at_the_top(path):
    """Files of ours that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *[f"{node.module}.{alias.name}" for alias in node.names]]
        for name in names:
            file = ROOT / (name.replace(".", "/") + ".py")
            file = file if file.exists() else ROOT / name.replace(".", "/") / "__init__.py"
            if file.exists() and name not in SURROUNDINGS:
                yield file


def reading_list(start):
    """A stage and all that it imports, one after the other."""
    found, left = [], [start]
    while left:
        path = left.pop()
        if path not in found and path.read_text():
            found.append(path)
            left += imported_at_the_top(path)
    return found


def test_what_pretrain_imports_is_short():
    files = reading_list(ROOT / "pretrain.py")
    assert len(files) <= 17, [f.name for f in files]
    assert sum(code_lines(f) for f in files) <= 4060  # today's; 1,900 lines in 12 files are wanted
    assert not any("matplotlib" in f.read_text().split("\ndef ")[0] for f in files)


def test_what_a_step_runs_through_is_shorter(small, tmp_path, monkeypatch):
    """The functions of ours that run from the view to the update, with those of the thread that
    reads ahead.
    """
    seen, ours = (
        set(),
        set(our_files()) - {ROOT / "common" / "command.py"},
    )  # progress bars are no part of a step

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path in ours:
            seen.add((path, frame.f_code.co_name, frame.f_code.co_firstlineno))

    def draw_boxes(*args):
        sys.setprofile(note)
        return plain_boxes(*args)

    def add(*args):
        sys.setprofile(None)
        return plain_add(*args)

    plain_boxes, plain_add = data.draw_boxes, Meter.add
    monkeypatch.setattr(data, "draw_boxes", draw_boxes)
    monkeypatch.setattr(Meter, "add", add)
    monkeypatch.setattr(pretrain, "draw_run", lambda *_: None)
    threading.setprofile(note)
    try:
        call(
            "pretrain.py", "--data", small, "--out", tmp_path / "run", *STEP, cwd=tmp_path, check=0
        )
    finally:
        threading.setprofile(None)
        sys.setprofile(None)
    lines = {path: functions(path) for path, *_ in seen}
    total = sum(lines[path].get((name, line), 0) for path, name, line in seen)
    places = {path.parent if path.parent.name == "kernels" else path for path, *_ in seen} | {
        ROOT / "pretrain.py"
    }
    total += functions(ROOT / "pretrain.py")[("main", first_line_of_main())]
    assert 300 < total <= 1300 and len(places) <= 9, (total, sorted(p.name for p in places))


def first_line_of_main():
    return next(line for name, line in functions(ROOT / "pretrain.py") if name == "main")
