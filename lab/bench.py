"""What the benchmarks share: flags, clocks, turns, percentiles, and a table of rows.

Machines are noisy. So what is compared takes turns in one run, and a comparison is the median of
the ratios within the turns.
"""

import csv
import itertools
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from common.door import save_csv
from common.train import Parser, UserError, at_least, command, commit, machine

OUT = Path("runs/bench")  # results/ is written where --out names it


def parser_of(doc):
    """A parser with the flags that every benchmark has."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--turns", type=at_least(1), default=5, help="that are compared (default: 5)")
    add("--small", action="store_true", help="tiny inputs, to try the path: no result")
    add("--out", type=Path, default=OUT, metavar="DIR", help=f"folder of the CSV ({OUT})")
    return parser


# ---- time ----------------------------------------------------------------------------------------


def now(device):
    """Seconds of the wall's clock, after all work of a GPU has ended."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def replays(calls, device, times=20):
    """A function that returns times of one call, in ms: each is the mean of all calls once.

    Give the calls inputs of their own, larger than the caches together. On a GPU they are one CUDA
    graph, so that the times do not contain Python, which is slower than most kernels.
    """

    def once():
        for call in calls:
            call()

    if device.type != "cuda":
        return lambda: [1000 * seconds_of(once, device) / len(calls) for _ in range(times)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a first run compiles, which a graph can't hold
        once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()

    def replay():
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        graph.replay()  # warms up
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / len(calls) for a, b in itertools.pairwise(marks)]

    return replay


def seconds_of(call, device):
    """How long a call takes."""
    start = now(device)
    call()
    return now(device) - start


def in_turns(calls, turns):
    """{name: call} -> {name: [what it returns in each turn]}. Every second turn goes backwards."""
    found = {name: [] for name in calls}
    for turn in range(turns):
        order = list(calls) if turn % 2 == 0 else list(calls)[::-1]
        for name in order:
            found[name].append(calls[name]())
    return found


def compared(times, base):
    """{name: ms of each turn} -> {name: columns}: percentiles of all turns together, and how many
    times as long as the base it takes, the median of the ratios of the turns.
    """
    found = {}
    for name, turns in times.items():
        values = np.percentile(np.concatenate(turns), (20, 50, 80)).round(4).tolist()
        pairs = zip(turns, times[base], strict=True)
        ratios = [np.median(own) / np.median(other) for own, other in pairs]
        found[name] = dict(zip(("p20_ms", "p50_ms", "p80_ms"), values, strict=True))
        found[name][f"times_as_long_as_{base}"] = round(statistics.median(ratios), 3)
    return found


def alone(function, *args, **options):
    """The result of a call in a process of its own, which then ends and frees all memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **options).result()
        except BrokenProcessPool:
            raise UserError("a process was killed; its memory may have been full") from None


def version_of(library):
    """Its version, or none. It is asked as a module: triton-windows is a triton, too."""
    return import_module(library).__version__ if find_spec(library) else "none"


def copy_speed(device):
    """Bytes a second, read and written, of a plain copy that is larger than the caches."""
    size = 2**30 if device.type == "cuda" else 2**24  # --small, which measures nothing
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = replays([lambda: target.copy_(source)], device)()
    return 2 * size / statistics.median(ms) * 1000


# ---- the table of rows ---------------------------------------------------------------------------


class Table:
    """A CSV that gets each row as soon as it is measured, behind those that are there.

    versions: further columns of every row, beside its command, machine and commit.
    """

    def __init__(self, path, device, **versions):
        self.path = path
        self.rows = read_table(path) if path.exists() else []
        self.where = {"machine": machine(device), **versions}
        self.where |= {"command": command(), "commit": commit()}

    def add(self, row):
        """Print a row and save it. Cells that it lacks are empty."""
        print(", ".join(f"{k} {value}" for k, value in row.items()), flush=True)
        self.rows.append(row | self.where)
        columns = dict.fromkeys(itertools.chain.from_iterable(self.rows))
        save_csv([{k: r.get(k, "") for k in columns} for r in self.rows], self.path)


def read_table(path):
    """-> the rows of a Table's file, dicts of text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
