"""The repository holds its own promises: what the README and the docstrings say is so."""

import ast
import contextlib
import csv
import functools
import io
import json
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mask as masking

STAGES = [
    name
    for name in (
        "data.py",
        "maps.py",
        "pretrain.py",
        "probe.py",
        "finetune_lora.py",
        "recognize.py",
        "tags.py",
        "segment.py",
        "detect.py",
        "export.py",
    )
    if (ROOT / name).exists()
]
OURS = {p.stem for p in ROOT.glob("*.py")} | {
    "kernels",
    "common",
    "ingest",
    "experiments",
    "benchmarks",
}


PAGES = {
    p.relative_to(ROOT).as_posix(): p.read_text()
    for p in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
README, TEXT = PAGES["README.md"], "\n".join(PAGES.values())
COMMAND = r"(?:python|torchrun [^\n]*?) (-m [\w.]+|\w+\.py)(?= |$|`)([^\n#`]*)"
NOT_OURS = {"--nproc-per-node", "--torch-backend"}  # torchrun's, uv's


@functools.cache
def flags_of(script):
    """-> the flags in the --help of `pretrain.py` or `-m experiments.run`, run in this process."""
    out, argv, name = io.StringIO(), sys.argv, script.removeprefix("-m ")
    sys.argv = [name, "--help"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
            if name == script:
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=False)
    finally:
        sys.argv = argv
    assert not end.value.code
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", out.getvalue()))


def commands():
    """-> {script: what follows it in each command of README and docs}; the tests' and pip's own are
    left out.
    """
    found = {}
    for script, rest in re.findall(COMMAND, TEXT.replace("\\\n", " ")):
        if script not in ("-m pytest", "-m timeit"):
            found.setdefault(script, []).append(rest)
    return found


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
    assert (
        len(first) == 2
        and "python pretrain.py --mask attn_high --ratio 0.75" in first[0]
        and "pytest" in first[1]
    )


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("script", sorted(commands()))
def test_every_flag_of_a_command_in_the_docs_is_in_help(script):
    known = flags_of(script)
    for rest in commands()[script]:
        recipe = (
            flags_of("pretrain.py") if "--recipe" in rest else set()
        )  # flags of pretrain.py, passed on
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) - known - recipe
        assert not unknown, f"{script} has no {unknown}: {rest}"


def test_every_flag_that_the_docs_speak_of_is_a_stages():
    known = set().union(*(flags_of(script) for script in {*STAGES, *commands()}))
    spoken = set(
        re.findall(r"(?<![\w-])--[a-z][a-z-]*(?!-)", re.sub(r"<!-- -->|\|[-|]+\|", "", TEXT))
    )
    assert not spoken - known - NOT_OURS


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    return {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.M)
    }


@pytest.mark.parametrize("name", [*PAGES, "results/TRIED.md", "results/STUDY.md"])
def test_every_link_leads_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{name}: {target}"


def test_every_file_that_the_readme_names_is_there():
    map_of_files = README[README.index("## The map") : README.index("## Exercise")]
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", map_of_files):
        assert (ROOT / name).exists() or name in ("toon.py", "datasets/", "maps/", "runs/"), name
    shown = set(re.findall(r"`(\w+\.py)`", map_of_files))
    assert {p.name for p in ROOT.glob("*.py")} <= shown, "a stage that the map leaves out"


def test_what_is_to_be_changed_stands_where_the_readme_says():
    rows = re.findall(r"^\| [^|]+ \| `([\w/]+\.py)` \| (`.*) \|$", TEXT, re.M)
    assert len(rows) >= 15
    for file, names in rows:
        code = (ROOT / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^\s*(?:def|class) {name}\b|^{name} = ", code, re.M), (
                f"{file} has no {name}"
            )


def test_what_the_glossary_explains_is_where_it_says():
    rows = re.findall(
        r"^\| ([^|`]+) \| [^|]+ \| `([\w/.]+\.py)[^`]*`(.*) \|$", PAGES["docs/glossary.md"], re.M
    )
    assert len(rows) > 20 and len({word for word, *_ in rows}) == len(rows)
    for word, file, names in rows:
        code = (ROOT / file).read_text()
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"^\s*(?:def|class) {name}\b|^{name} = ", code, re.M), (
                f"{word}: {file} has no {name}"
            )


def test_the_licence_is_there_and_the_readme_names_it():
    assert "MIT License" in (ROOT / "LICENSE").read_text() and "](LICENSE)" in README
    cite = (ROOT / "CITATION.cff").read_text()
    title = re.search(r'^title: "(.*)"$', cite, re.M).group(1)
    assert "cff-version: 1.2.0" in cite and title in " ".join(README.split())


NUMBER = r"(?<![\w.])[-+]?(?:\d+[\d,]*(?:\.\d+)?|\.\d+)(?:e-?\d+)?"


def lines_about(key, links):
    """-> {link: text} of files under results/: the lines that are about `key`, else all of them."""
    texts = {name: (ROOT / name).read_text() for name in links}
    if key:
        about = re.compile(rf"`{re.escape(key)}`|^{re.escape(key)},|\| {re.escape(key)} \|")
        found = {n: [x for x in text.splitlines() if about.search(x)] for n, text in texts.items()}
        if any(found.values()):
            return {name: "\n".join(lines) for name, lines in found.items()}
    return texts


def read_results(links, key=None):
    """-> the numbers in these files, with their signs. JSON has shares: percents, too."""
    found = []
    for name, text in lines_about(key, links).items():
        numbers = [float(x.replace(",", "")) for x in re.findall(NUMBER, text.replace(",", ", "))]
        found += numbers
        if str(name).endswith(".json"):
            found += [100 * x for x in numbers if x % 1]
    return found


def missing(numbers, known):
    """Those of the numbers, as they are written, that no number of the files rounds to. A number
    with a sign needs one of the same sign.
    """
    lost = []
    for written in numbers:
        value, unit = float(written.replace(",", "")), 10 ** -len(written.partition(".")[2])
        signed = written[0] in "+-"
        others = known if signed else map(abs, known)
        if not any(abs(value - other) <= 0.5000001 * unit for other in others):
            lost.append(written)
    return lost


RESULT = r"\((?:\.\./)?(results/[\w./-]+\.(?:csv|json|md))\)"


def tables():
    """-> [(rows, source line)] of every table in README and docs; "" where no source line follows.

    A source line begins with "Source:" and stands under its table.
    """
    found = re.findall(r"((?:^\|.*\|\n)+)(?:\n(Source:.*)\n)?", TEXT, re.M)
    return [(rows.splitlines(), source) for rows, source in found]


def test_the_numbers_in_tables_stand_in_results():
    """A table names a file under results/, in its source line or in a row: its numbers are in there."""
    checked = 0
    for rows, source in tables():
        for line in rows[2:]:
            links = re.findall(RESULT, line) or re.findall(RESULT, source)
            if not links:
                continue
            cells = [c.strip() for c in line.strip("|").split("|")]
            figures = " ; ".join(cell for cell in cells[1:] if "`" not in cell and "](" not in cell)
            numbers = re.findall(r"(?<![\w.x])[-+]?\d[\d,]*(?:\.\d+)?(?![\w.]*px|x\d|\d)", figures)
            key = re.search(r"`([^`]+)`", cells[0])
            known = read_results(links, key and key.group(1))
            lost = missing([n.rstrip(",") for n in numbers], known)
            assert not lost, f"{lost} of {cells[0]!r} are not in its file"
            checked += 1
    assert checked > 30


@pytest.mark.parametrize("title", ["What to expect", "What came out"])
def test_the_numbers_of_a_section_of_the_readme_stand_in_results(title):
    paragraph = re.search(rf"^## {title}\n.*?(?=^## )", README, re.S | re.M).group()
    numbers = re.findall(r"\d+\.\d+|[\d,]+(?= characters| seconds| MB)", paragraph)
    assert len(numbers) >= 4 and not missing(numbers, read_results(re.findall(RESULT, paragraph)))


def test_the_numbers_that_the_docs_tell_of_the_study_stand_in_it():
    section = TEXT[
        TEXT.index("Differences in points of linear Top-1") : TEXT.index("## What did the encoder")
    ]
    numbers = re.findall(r"(?<![\w.])\d*\.\d+", section)
    tables = [p.relative_to(ROOT) for p in ROOT.glob("results/study/*/table.md")]
    tables.append("results/STUDY.md")
    assert len(numbers) > 20 and not missing(numbers, read_results(tables))


def test_the_table_of_masks_is_whole_and_its_costs_are_the_measured_ones():
    with open(ROOT / "results" / "bench_masks.csv") as file:
        cost = {
            r["mask"]: float(r["over_random_percent"])
            for r in csv.DictReader(file)
            if r["model"] == "nano"
        }
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| (\S+) % \|$", PAGES["docs/masks.md"], re.M))
    assert set(table) == set(masking.STRATEGIES)
    cost["squares"] = cost["simmim"]  # measured under the name of the network that it trains
    assert {name: abs(float(x)) for name, x in table.items()} == {
        name: abs(cost[name]) for name in table
    }


@pytest.mark.parametrize("script", STAGES)
def test_every_stage_says_what_it_reads_and_writes(script):
    text = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    assert re.search(r"^Reads:", text, re.M) and re.search(r"^Writes:", text, re.M)


def floor_of(name):
    """The floors of the house, from the ground up; nobody imports from a floor above its own."""
    top, _, rest = name.partition(".")
    grounds = {
        "mask": 0,
        "kernels": 0,
        "common.io": 0,
        "common.fields": 0,
        "common.command": 0,
        "model": 1,
        "data": 1,
        "ingest": 2,
    }
    found = grounds.get(f"common.{rest}" if top == "common" else top)
    above = {
        "common": 2,
        "experiments": 4,
        "benchmarks": 4,
        "demo": 4,
        "export": 4,
    }  # the page is made of the stages, and every stage's runs are exported
    return found if found is not None else above.get(top, 3)


def module_files():
    """-> [(name, path)] of every module of ours, the tests left out."""
    words = {p: p.relative_to(ROOT).with_suffix("").parts for p in ROOT.rglob("*.py")}
    words = {
        p: w
        for p, w in words.items()
        if w[0] not in ("tests", "runs") and not any(x.startswith(".") for x in w)
    }
    return [(".".join(w).removesuffix(".__init__"), p) for p, w in words.items()]


def arrows():
    """-> {module: the modules of ours that it imports, at its top or in a function}."""
    names = dict(module_files())
    known = lambda i: i if i in names else i.rpartition(".")[0]  # noqa: E731 (a name in a module is no module)
    return {name: {known(i) for i in imports(path)} - {name, ""} for name, path in names.items()}


LOADS = {  # a stage that uses what another makes: its networks, its adapters
    ("recognize", "finetune_lora"),
    ("export", "finetune_lora"),
    ("detect", "finetune_lora"),
    ("recognize", "detect"),
    ("probe", "tags"),
    ("export", "detect"),
    ("export", "tags"),
    ("export", "segment"),
}


PACKING = ("ingest.pack", "ingest.rows")  # data.py imports them in the functions that write


def test_no_arrow_runs_back_up():
    for name, targets in arrows().items():
        for target in targets - {"common", "ingest", "experiments", "benchmarks"}:
            if (name, target) in LOADS:
                continue
            assert not (floor_of(target) == floor_of(name) == 3), (
                f"{name} imports another stage, {target}"
            )
            if name != "data" or target not in PACKING:
                assert floor_of(target) <= floor_of(name), (
                    f"{name} imports {target}, which is above it"
                )


def test_no_cycle():
    left = {name: set(targets) for name, targets in arrows().items()}
    left["data"].discard(
        "ingest.pack"
    )  # imported in a function: packing imports data only to show a set
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    assert not left, f"a cycle of imports: {left}"


def test_results_name_their_machine_and_commit():
    for path in (ROOT / "results").glob("*.csv"):
        rows = list(csv.DictReader(path.open()))
        assert rows and all(row.get("machine") and row.get("commit") for row in rows), path
    for path in (ROOT / "results").glob("*.json"):
        row = json.loads(path.read_text())
        assert row.get("machine") and row.get("commit") and row.get("command"), path


def test_nothing_of_the_development_data_is_in_the_repository():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert not [
        f for f in files if "faces20" in f and f.endswith((".png", ".webp", ".safetensors", ".zip"))
    ]
    assert sys.version_info >= (3, 10)


def requirements(pattern):
    """Files of pip -> [Requirement], without comments and names of other files."""
    text = "\n".join(path.read_text() for path in ROOT.glob(pattern))
    lines = [re.sub(r"\s*#.*", "", line) for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def test_every_requirement_has_a_tested_version():
    tested = {canonicalize_name(r.name): r for r in requirements("constraints.txt")}
    for wanted in requirements("requirements*.txt"):
        found = tested[canonicalize_name(wanted.name)]
        version = str(found.specifier).removeprefix("==")
        assert wanted.specifier.contains(version) and not found.url, wanted
