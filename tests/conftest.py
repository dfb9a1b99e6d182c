"""What the tests share: the repository on the path, a way to run a stage as a user does, small data."""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# Our code lies at most one folder deep; an environment in the repository, of any name, lies deeper.
CODE = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
SHARED = ROOT.parent / "shared" / "data"
FLAG = r"(?<![\w-])--[a-z][a-z-]*"
MISSING = re.compile(r"\w+ is missing: pip install -e .*")  # as command.require says it
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="links, names or signals of Linux")
WORDS = ("red", "green", "blue", "hat", "smile")  # of the pictures of `tagged`
sys.path.insert(0, str(ROOT))
# pytest's first process makes this folder, those that it starts share it, and it ends with the first.
if "ANIMASK_HOME" not in os.environ:
    FOLDER = tempfile.TemporaryDirectory(prefix="animask-home-")
    os.environ["ANIMASK_HOME"] = FOLDER.name
HOME = Path(os.environ["ANIMASK_HOME"])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests are two processes, and so are theirs
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

import mask as masking  # noqa: E402
from common import train  # noqa: E402
from common.train import cli  # noqa: E402


def pytest_collection_modifyitems(items):
    """The longest test begins first, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.name != "test_the_tour_runs_from_top_to_bottom")


# ---- running a stage -----------------------------------------------------------------------------


MAIN_OF = {"data.py": "ingest.pack"}  # it has none of its own


def each_flag_once(words):
    """Words of a command, each flag with its values once; of one that is there twice, the later."""
    groups, name = {}, None  # a flag and its values
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            groups[name] = []
        groups.setdefault(name, []).append(word)
    return [word for group in groups.values() for word in group]


def call(script, *words, cwd, check=None):
    """Run a stage in the folder cwd -> returncode, stdout, stderr; without the seconds of a start.

    script: a stage, or a module as after `python -m`, such as lab.run. check: the status that it has
    to end with. Where that is 0 and an extra is not here, the test is skipped, in the stage's words.
    """
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, errors = io.StringIO(), io.StringIO()
    code, argv = 0, sys.argv
    here = os.getcwd()
    name = script if script.endswith(".py") else f"{script.replace('.', '/')}.py"
    sys.argv = [name, *each_flag_once(map(str, words))]  # a test's own flag counts
    module = importlib.import_module(MAIN_OF.get(script, script.removesuffix(".py")))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            os.chdir(cwd)
            cli(module.main)
    except SystemExit as done:
        code = done.code or 0
    finally:
        sys.argv = argv
        os.chdir(here)
        for number, handler in signals.items():
            signal.signal(number, handler)
    lacks = MISSING.search(errors.getvalue())
    if code and check == 0 and lacks and not os.environ.get("CI"):
        pytest.skip(lacks.group())
    assert check is None or code == check, out.getvalue() + errors.getvalue()
    return subprocess.CompletedProcess([script, *words], code, out.getvalue(), errors.getvalue())


def run_line(line, cwd, check=None):
    """The same by a line of words without spaces in them, such as "data.py images --out packed"."""
    return call(*line.split(), cwd=cwd, check=check)


def python(*words, cwd=ROOT, check=0, **env):
    """Python in a process of its own, which has to end with this status -> what it printed."""
    command = [sys.executable, *map(str, words)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == check, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@functools.cache
def flags_of(script):
    """-> the flags in the --help of `pretrain.py` or `-m lab.run`."""
    done = call(script.removeprefix("-m "), "--help", cwd=ROOT, check=0)
    return set(re.findall(FLAG, done.stdout))


def json_of(line, cwd):
    """What a stage prints as JSON, a row in each line."""
    return [json.loads(row) for row in run_line(line, cwd, check=0).stdout.splitlines()]


def refused(done):
    """The one line with which a stage refuses bad input."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr  # a bar may have lines, too
    return lines[0]


FIGURES = ("common.plots.image_grid", "common.plots.curves", "probe.draw_neighbours")
FIGURES += ("common.plots.tuning_curves", "common.plots.confusion")


@pytest.fixture
def no_pictures(monkeypatch):
    """Figures take most of the time of a short run."""
    for name in FIGURES:
        monkeypatch.setattr(name, lambda *_, **__: None)


@pytest.fixture
def bright(monkeypatch):
    """The strategy that mask.py has as an example in its docstring, added as the docstring says."""
    code = textwrap.dedent(re.search(r"    def bright.*?\n\n", masking.__doc__, re.S).group())
    source = (ROOT / "mask.py").read_text().replace("\nNEEDS = {", f"\n{code}\nNEEDS = {{")
    for table, entry in re.findall(r"(STRATEGIES|NEEDS)\s+has `(.*?)`", masking.__doc__):
        source = source.replace(f"\n{table} = {{", f"\n{table} = {{\n    {entry},")
    changed = {"__name__": "changed"}
    exec(source, changed)
    for name in ("STRATEGIES", "NEEDS", "PARAMS"):
        monkeypatch.setattr(masking, name, changed[name])


@contextlib.contextmanager
def stopped(step, number=signal.SIGTERM):
    """Every run gets this signal in this step."""
    plain = train.Run.update

    def update(run, *numbers):
        plain(run, *numbers)
        if run.step == step:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "update", update)
        yield


def state_of(out):
    """state.pt of a run."""
    return torch.load(out / "state.pt", weights_only=True)


def equal(one, two):
    """Whether two dicts of tensors are the same bits."""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---- data ----------------------------------------------------------------------------------------


def some_view(B=3, S=32):
    """Noise, u8 (B, S, S, 3)."""
    draws = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (B, S, S, 3), dtype=torch.uint8, generator=draws)


def shaken(network):
    """Every parameter moved: biases and norms begin at 0 and 1, which would hide a mistake."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, w in network.named_parameters():
            if "pos_embed" not in name and "position" not in name:
                w.add_(torch.randn(w.shape, generator=draws) * 0.1)
    return network.eval()


def draw_folder(root, classes=3, each=12, size=(48, 40), seed=0):
    """A folder per class of small noisy PNGs with a class colour."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        folder = Path(root) / f"class{c}"
        folder.mkdir(parents=True, exist_ok=True)
        colour = rng.integers(0, 256, 3)
        for i in range(each):
            pixels = np.clip(colour + rng.normal(0, 40, (size[1], size[0], 3)), 0, 255)
            picture = Image.fromarray(pixels.astype(np.uint8))
            picture.save(folder / f"illust{i // 2}_{i % 2}.png")
    return Path(root)


@pytest.fixture(scope="package")
def small(tmp_path_factory):
    """A packed data set of 3 classes, 32 px: the path of its folder."""
    base = tmp_path_factory.mktemp("small")
    draw_folder(base / "images", each=40)
    run_line("data.py images --out packed --size 32", base, check=0)
    return base / "packed"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A home with a run of every stage (made.py), shared by the tests of a file."""
    from made import home

    return home(tmp_path_factory.mktemp("base"))


@pytest.fixture
def at(base, monkeypatch):
    """The same, as the current folder."""
    monkeypatch.chdir(base)
    return base


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A home of a test's own, as the current folder."""
    from made import home

    monkeypatch.chdir(home(tmp_path))
    return tmp_path / "home"


def shared_file(name):
    """A file of ../shared/data, or skip: those images can't be given away with the code."""
    path = SHARED / name
    if not path.exists():
        assert not os.environ.get("CI"), f"{path} must be there in CI"
        pytest.skip(f"{path} is not here: this test needs the development data")
    return path
