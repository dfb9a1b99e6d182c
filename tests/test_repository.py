"""The repository holds its own promises: what the README and the docstrings say is so."""

import ast
import csv
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, stage

import mask as masking

README = (ROOT / "README.md").read_text()
STAGES = [name for name in ("data.py", "maps.py", "pretrain.py", "probe.py", "finetune_lora.py", "recognize.py")
          if (ROOT / name).exists()]  # fmt: skip
OURS = {s[:-3] for s in STAGES} | {"data", "loader", "evaluate", "plumbing", "ranks", "model", "checkpoints", "formats",
                                   "mask", "saliency", "guides", "classifier", "gallery", "labelled",
                                   "augment", "kernels", "lab"}  # fmt: skip


def imports(path):
    """The modules of ours that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in OURS}


def test_the_readme_begins_with_two_commands():
    first = re.search(r"```\n(.*?)```", README, re.S).group(1).strip().splitlines()
    assert len(first) == 2 and "python pretrain.py --mask attn_high --ratio 0.75" in first[0] and "pytest" in first[1]


@pytest.mark.parametrize("script", STAGES)
def test_every_flag_in_the_readme_is_in_help(script):
    known = stage(script, "--help", cwd=ROOT, check=0).stdout
    lines = [line for line in README.splitlines() if f"python {script}" in line]
    for line in lines:
        command = line[line.index(f"python {script}") :].split("#")[0].split("`")[0]
        for flag in re.findall(r"(--[a-z][a-z-]+)", command):
            assert flag in known, f"{script} has no {flag}: {line}"


@pytest.mark.parametrize("script", STAGES)
def test_every_stage_says_what_it_reads_and_writes(script):
    text = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    assert re.search(r"^Reads:", text, re.M) and re.search(r"^Writes:", text, re.M)


def test_who_imports_whom():
    alone = [*(ROOT / "kernels").glob("*.py"), ROOT / "mask.py", ROOT / "saliency.py", ROOT / "plumbing.py"]
    alone += [ROOT / "lab" / f"{name}.py" for name in ("toon", "metrics", "plot")]
    for path in alone:
        allowed = {"kernels", "kernels.choose_impl", "kernels.gather"} if path.parent.name == "kernels" else set()
        assert {i for i in imports(path) if not any(i.startswith(a) for a in allowed)} == set(), path
    for script in STAGES:
        others = {s[:-3] for s in STAGES} - {script[:-3], "data"}
        assert not imports(ROOT / script) & others, f"{script} imports another stage"


def test_the_readmes_numbers_stand_in_results():
    """Each row of its tables of numbers names a file under results/: every number of the row's figure is in there."""
    rows = re.findall(r"^\|.*\(results/([\w./-]+)\).*\|$", README, re.M)
    assert rows
    for line in re.findall(r"^\|.*results/[\w./-]+.*\|$", README, re.M):
        cells = [c.strip() for c in line.strip("|").split("|")]
        text = " ".join((ROOT / name).read_text() for name in re.findall(r"\((results/[\w./-]+)\)", line))
        known = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text)]
        figures = " ; ".join(cell for cell in cells[1:] if "`" not in cell and "](" not in cell)
        for number in re.findall(r"(?<![\w.x])\d[\d,]*(?:\.\d+)?(?![\w.]*px|x\d|\d)", figures):
            digits = len(number.partition(".")[2])
            value = float(number.replace(",", ""))
            assert any(abs(value - k) <= 0.5000001 * 10**-digits for k in known), (
                f"{number} of {cells[0]!r} is not in its file"
            )


def test_the_readmes_table_of_masks_is_whole_and_its_costs_are_the_measured_ones():
    with open(ROOT / "results" / "bench_masks.csv") as file:
        cost = {r["mask"]: float(r["over_random_percent"]) for r in csv.DictReader(file) if r["model"] == "nano"}
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| (\S+) % \|$", README[README.index("## Masks") :], re.M))
    assert set(table) == set(masking.STRATEGIES)
    assert {name: abs(float(x)) for name, x in table.items()} == {name: abs(cost[name]) for name in table}


def test_results_name_their_machine_and_commit():
    for path in (ROOT / "results").glob("*.csv"):
        rows = list(csv.DictReader(path.open()))
        assert rows and all(row.get("machine") and row.get("commit") for row in rows), path
    for path in (ROOT / "results").glob("*.json"):
        row = json.loads(path.read_text())
        assert row.get("machine") and row.get("commit") and row.get("command"), path


def test_nothing_of_the_development_data_is_in_the_repository():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    charts = r"results/study/[\w-]+/(curves|bars|grid)\.png"  # they show numbers, no picture
    files = [f for f in files if not re.fullmatch(charts, f)]
    assert not [f for f in files if "faces20" in f and f.endswith((".png", ".webp", ".safetensors", ".zip"))]
    assert sys.version_info >= (3, 10)
