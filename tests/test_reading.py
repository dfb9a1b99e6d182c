"""What a student has to read for `python pretrain.py --mask attn_high --ratio 0.75`, counted."""

import ast

from conftest import ROOT

SURROUNDINGS = {"common.plots", "ingest.toon"}  # pictures and the painter are not counted


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
    lines = sum(len(file.read_text().splitlines()) for file in files)
    assert len(files) <= 15, [f.name for f in files]  # 12 files are wanted
    assert lines <= 3743  # today's; 1,900 are wanted
    assert not any("matplotlib" in f.read_text().split("\ndef ")[0] for f in files)
