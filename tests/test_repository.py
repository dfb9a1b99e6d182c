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
OURS = {p.stem for p in ROOT.glob("*.py")} | {"kernels", "common", "ingest", "experiments", "benchmarks"}


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


def floor_of(name):
    """The floors of the house, from the ground up; nobody imports from a floor above its own."""
    top, _, rest = name.partition(".")
    grounds = {"mask": 0, "kernels": 0, "common.io": 0, "model": 1, "data": 1, "ingest": 2}
    found = grounds.get(f"common.{rest}" if top == "common" else top)
    return found if found is not None else {"common": 2, "experiments": 4, "benchmarks": 4}.get(top, 3)


def module_files():
    """-> [(name, path)] of every module of ours, the tests left out."""
    words = {p: p.relative_to(ROOT).with_suffix("").parts for p in ROOT.rglob("*.py")}
    words = {p: w for p, w in words.items() if w[0] not in ("tests", "runs") and not any(x.startswith(".") for x in w)}
    return [(".".join(w).removesuffix(".__init__"), p) for p, w in words.items()]


def arrows():
    """-> {module: the modules of ours that it imports, at its top or in a function}."""
    names = dict(module_files())
    known = lambda i: i if i in names else i.rpartition(".")[0]  # noqa: E731 (a name in a module is no module)
    return {name: {known(i) for i in imports(path)} - {name, ""} for name, path in names.items()}


def test_no_arrow_runs_back_up():
    for name, targets in arrows().items():
        for target in targets - {"common", "ingest", "experiments", "benchmarks"}:
            assert not (floor_of(target) == floor_of(name) == 3), f"{name} imports another stage, {target}"
            if (name, target) != ("data", "ingest.pack"):  # its packing half, imported in the function that packs
                assert floor_of(target) <= floor_of(name), f"{name} imports {target}, which is above it"


def test_no_cycle():
    left = {name: set(targets) for name, targets in arrows().items()}
    left["data"].discard("ingest.pack")  # imported in a function: packing imports data only to show a set
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    assert not left, f"a cycle of imports: {left}"


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
