"""What the benchmarks share: clocks, turns, percentiles, the speed of a copy, and the table of rows.

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
from pathlib import Path

import numpy as np
import torch

from common.door import save_csv
from common.train import Parser, UserError, at_least, commit, machine
from kernels.patches import TRITON as HAS_TRITON

if HAS_TRITON:
    import triton

OUT = Path("runs/bench")  # results/ is written where --out names it
TRITON = triton.__version__ if HAS_TRITON else "none"


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


def milliseconds(call, device, seconds=0.3):
    """Times of single calls, in ms. On a GPU each call begins with a cold L2 cache."""
    if device.type == "cuda" and HAS_TRITON:
        return triton.testing.do_bench(call, rep=1000 * seconds, return_mode="all")
    call()  # warms up
    times = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() < begin + seconds:
        start = now(device)
        call()
        times.append(1000 * (now(device) - start))
    return times


def replays(calls, device, times=20):
    """A function that returns times of one call, in ms: each is the mean of all calls once.

    Give the calls inputs of their own, larger than the caches together. On a GPU they are one CUDA
    graph, so that the times do not contain Python, which is slower than most kernels.
    """
    if device.type != "cuda":
        return lambda: [ms for call in calls for ms in milliseconds(call, device, 0.3 / len(calls))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a first run compiles, which a graph can't hold
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

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


def in_turns(calls, turns, measure):
    """{name: call} -> {name: [measure(call) of each turn]}. Every second turn goes backwards."""
    found = {name: [] for name in calls}
    for turn in range(turns):
        order = list(calls) if turn % 2 == 0 else list(calls)[::-1]
        for name in order:
            found[name].append(measure(calls[name]))
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


def copy_speed(device):
    """Bytes a second, read and written, of a plain copy that is larger than the caches."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), device)
    return 2 * size / statistics.median(ms) * 1000


# ---- the table of rows ---------------------------------------------------------------------------


class Table:
    """A CSV that gets each row as soon as it is measured. A row that is there is not measured again.

    keys: the columns that say what was measured. Rows of another machine or commit are others.
    """

    def __init__(self, path, keys, device, **versions):
        self.path = path
        self.keys = (*keys, "machine", "commit")
        self.rows = read_table(path) if path.exists() else []
        self.where = {"machine": machine(device), **versions, "commit": commit()}

    def find(self, **keys):
        """The row that has these values under the keys, or None."""
        wanted = {k: str(value) for k, value in (keys | self.where).items() if k in self.keys}
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def add(self, row):
        """Print a row and save it, in place of one with its keys. Cells that it lacks are empty."""
        old = self.find(**row)
        print(", ".join(f"{k} {value}" for k, value in row.items()), flush=True)
        self.rows = [r for r in self.rows if r is not old]
        self.rows.append({k: str(value) for k, value in (row | self.where).items()})
        columns = dict.fromkeys(itertools.chain.from_iterable(self.rows))
        save_csv([{k: r.get(k, "") for k in columns} for r in self.rows], self.path)


def read_table(path):
    """-> the rows of a Table's file, dicts of text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
