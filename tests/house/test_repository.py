"""The repository holds its own promises: what the README and the docstrings say is so."""

import ast
import csv
import functools
import graphlib
import json
import re
import subprocess

import pytest
import torch
from conftest import CODE, FLAG, ROOT, flags_of
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mask as masking
from finetune_lora import add_lora
from model import SIZES, ViT

STAGES = ["data.py", "pretrain.py", "probe.py", "finetune_lora.py"]
APPS = [path.stem for path in sorted(ROOT.glob("apps/*.py")) if "cli(main)" in path.read_text()]
STAGES += [f"-m apps.{name}" for name in APPS if name != "demo"]
PACKAGES = ("kernels", "common", "ingest", "apps", "lab", "exercises")
OURS = {p.stem for p in ROOT.glob("*.py")} | set(PACKAGES)
FILES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "exercises/README.md"]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
README, TEXT = PAGES["README.md"], "\n".join(PAGES.values())


# ---- commands and flags --------------------------------------------------------------------------


def commands():
    """-> {script: what follows it in each command of README and docs}, but for pytest and timeit."""
    pattern, found = r"(?:python|torchrun [^\n]*?) (-m [\w.]+|\w+\.py)(?= |$|`)([^\n#`]*)", {}
    for script, rest in re.findall(pattern, TEXT.replace("\\\n", " ")):
        if script not in ("-m pytest", "-m timeit"):
            found.setdefault(script, []).append(rest)
    return found


@pytest.mark.parametrize("script", sorted(commands()))
def test_every_flag_of_a_command_in_the_docs_is_in_help(script):
    for rest in commands()[script]:
        assert set(re.findall(FLAG, rest)) <= flags_of(script), rest


def test_every_flag_that_the_docs_speak_of_is_a_stages():
    known = set().union(*(flags_of(script) for script in {*STAGES, *commands()}))
    spoken = re.findall(FLAG + "(?!-)", re.sub(r"<!-- -->|\|[-|]+\|", "", TEXT))
    assert set(spoken) <= known | {"--nproc-per-node", "--torch-backend"}  # torchrun's, uv's


# ---- links and names -----------------------------------------------------------------------------


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*PAGES, "results/TRIED.md", "results/STUDY.md"])
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / name).read_text()):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists() and (not anchor or anchor in anchors(file.read_text())), target


def test_every_file_that_the_readme_names_is_there():
    map_of_files = README[README.index("## What is where") :]
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", map_of_files):
        assert (ROOT / name).exists() or name in ("toon.py", "datasets/", "maps/", "runs/"), name
    shown = set(re.findall(r"`(\w+\.py)`", map_of_files))
    assert {p.name for p in ROOT.glob("*.py")} <= shown, "a stage that the map leaves out"


def test_what_is_to_be_changed_is_where_the_docs_say():
    rows = re.findall(r"^\| [^|]+ \| `([\w/]+\.py)` \| (`.*) \|$", TEXT, re.M)
    assert len(rows) >= 15
    for file, names in rows:
        code = (ROOT / file).read_text()
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            known = re.search(rf"^\s*(?:def|class) {name}\b|^{name} = ", code, re.M)
            assert known, f"{file} has no {name}"


@pytest.mark.parametrize("script", STAGES)
def test_every_stage_says_what_it_reads_and_writes(script):
    path = script.removeprefix("-m ").removesuffix(".py").replace(".", "/")
    text = ast.get_docstring(ast.parse((ROOT / f"{path}.py").read_text()))
    assert re.search(r"^Reads:", text, re.M) and re.search(r"^Writes:", text, re.M)


# ---- numbers -------------------------------------------------------------------------------------

NUMBER = r"(?<![\w.])[-+]?(?:\d+[\d,]*(?:\.\d+)?|\.\d+)(?:e-?\d+)?"
RESULT = r"\((?:\.\./)?(results/[\w./-]+\.(?:csv|json|md))\)"


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
    """Numbers, as they are written, that no number of the files rounds to, signs included."""
    lost = []
    for written in numbers:
        value, unit = float(written.replace(",", "")), 10 ** -len(written.partition(".")[2])
        others = known if written[0] in "+-" else map(abs, known)
        if not any(abs(value - other) <= 0.5000001 * unit for other in others):
            lost.append(written)
    return lost


def test_the_numbers_in_tables_stand_in_results():
    """A table names a file under results/, in its source line or in a row: its numbers are in there."""
    checked = 0
    for rows, source in re.findall(r"((?:^\|.*\|\n)+)(?:\n(Source:.*)\n)?", TEXT, re.M):
        for line in rows.splitlines()[2:]:
            if links := re.findall(RESULT, line) or re.findall(RESULT, source):
                first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
                figures = " ; ".join(x for x in cells if "`" not in x and "](" not in x)
                pattern = r"(?<![\w.x])[-+]?\d[\d,]*(?:\.\d+)?(?![\w.]*px|x\d|\d)"
                numbers = [number.rstrip(",") for number in re.findall(pattern, figures)]
                key = re.search(r"`([^`]+)`", first)
                assert not missing(numbers, read_results(links, key and key.group(1))), first
                checked += 1
    assert checked > 30


@pytest.mark.parametrize("title", ["What you see after the first command", "What we found"])
def test_the_numbers_of_a_section_of_the_readme_stand_in_results(title):
    paragraph = re.search(rf"^## {title}\n.*?(?=^## )", README, re.S | re.M).group()
    numbers = re.findall(r"\d+\.\d+|[\d,]+(?= characters| seconds| MB)", paragraph)
    assert len(numbers) >= 4 and not missing(numbers, read_results(re.findall(RESULT, paragraph)))


def test_the_numbers_that_the_docs_tell_of_the_study_stand_in_it():
    start = TEXT.index("Differences from random masks in linear Top-1")
    section = TEXT[start : TEXT.index("## What did the encoder")]
    numbers = re.findall(r"(?<![\w.])\d*\.\d+", section)
    tables = [path.relative_to(ROOT) for path in ROOT.glob("results/study/*/table.md")]
    known = read_results([*tables, "results/STUDY.md"])
    assert len(numbers) > 20 and not missing(numbers, known)


def test_the_table_of_masks_is_whole_and_its_costs_are_the_measured_ones():
    with open(ROOT / "results" / "bench_masks.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "nano"]
    cost = {row["mask"]: abs(float(row["over_random_percent"])) for row in rows}
    cost["squares"] = cost["simmim"]  # measured under the name of the network that it trains
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| (\S+) % \|$", PAGES["docs/masks.md"], re.M))
    assert {name: abs(float(x)) for name, x in table.items()} == {
        name: cost[name] for name in masking.STRATEGIES if name in cost
    }


def test_results_name_their_machine_and_commit():
    rows = [(path, json.loads(path.read_text())) for path in (ROOT / "results").glob("*.json")]
    assert all(row.get("command") for _, row in rows)
    for path in (ROOT / "results").glob("*.csv"):
        rows += [(path, row) for row in csv.DictReader(path.open())]
    assert not [path for path, row in rows if not (row.get("machine") and row.get("commit"))]


def test_shares_of_lora_are_those_in_the_docs():
    """Parameters that rank 8 trains, of those of the encoder."""
    given = re.findall(r"([\d.]+) % of (\w+)'s", PAGES["docs/checkpoints.md"])
    assert {size for _, size in given} == {"nano", "base"}
    for share, size in given:
        with torch.device("meta"):
            shape = {k: v for k, v in SIZES[size].items() if not k.startswith("decoder_")}
            encoder = ViT(**shape)
        whole = sum(w.numel() for w in encoder.parameters())
        add_lora(encoder, 8)
        trained = sum(w.numel() for w in encoder.parameters() if w.requires_grad)
        assert float(share) == round(100 * trained / whole, 2)


# ---- imports -------------------------------------------------------------------------------------

LESSON = {"kernels", "mask", "model", "data", "common"}  # what its stages stand on
MAY_IMPORT = {  # a package or a file, and what of the others it may import; at its top, data no packer
    "kernels": set(),
    "mask": {"kernels"},
    "model": {"kernels"},
    "data": {"common.train", "ingest"},
    "common": {"kernels", "mask", "model", "data"},
    "ingest": {"common"},
    "pretrain": LESSON,
    "probe": LESSON,
    "finetune_lora": LESSON,
    "apps": LESSON | {"ingest", "pretrain", "probe", "finetune_lora"},
    "lab": LESSON | {"ingest", "pretrain", "probe", "finetune_lora", "apps"},
    "exercises": LESSON | {"ingest", "lab"},  # and nobody imports them
}


def module_files():
    """-> {name: path} of every module of ours, the tests left out."""
    found = {}
    for path in CODE:
        words = path.relative_to(ROOT).with_suffix("").parts
        if words[0] in OURS:
            found[".".join(words).removesuffix(".__init__")] = path
    return found


def imports(path, nodes=ast.walk):
    """The modules of ours that a file imports, at its top or in a function."""
    names, known = set(), module_files()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name in known}


@functools.cache
def arrows():
    """-> {module: the modules of ours that it imports}."""
    return {name: imports(path) - {name} for name, path in module_files().items()}


@pytest.mark.parametrize("name", sorted(module_files()))
def test_nobody_imports_what_stands_above(name):
    home = name.partition(".")[0]
    for target in arrows()[name] - set(PACKAGES):
        other = target.partition(".")[0]
        assert other == home or {target, other} & MAY_IMPORT[home], f"{name} imports {target}"


def test_who_reads_a_packed_set_needs_no_packer():
    at_top = imports(ROOT / "data.py", lambda tree: tree.body)
    assert at_top - set(PACKAGES) == {"common.train"}


def test_no_cycle():
    """Imports in functions count, too."""
    graphlib.TopologicalSorter(arrows()).prepare()  # a CycleError names them


# ---- what is installed and what is given away ----------------------------------------------------


def test_nothing_of_the_development_data_is_in_the_repository():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    pictures = (".png", ".webp", ".safetensors", ".zip")
    files = done.stdout.split()
    assert files and not [f for f in files if "faces20" in f and f.endswith(pictures)]


def requirements(name):
    """A file of pip -> [Requirement], without comments."""
    lines = [re.sub(r"\s*#.*", "", line) for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def test_every_requirement_has_a_tested_version():
    """pyproject.toml lists them, and requirements.txt those that every stage needs."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = set(map(Requirement, project["dependencies"]))
    assert set(requirements("requirements.txt")) == needed
    for extra in project["optional-dependencies"].values():
        needed |= {Requirement(line) for line in extra if not line.startswith("animask")}
    tested = {canonicalize_name(r.name) for r in requirements("constraints.txt")}
    assert {canonicalize_name(r.name) for r in needed} <= tested  # pip refuses what contradicts
