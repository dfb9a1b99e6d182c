"""What the benches share: where a row was made, how rows are kept, clocks, and the memory that a process holds."""

import time
from pathlib import Path

import torch

from common.io import read_csv, save_csv
from common.train import commit, machine
from kernels import triton

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRITON = triton.__version__ if triton else "none"


def about(device, **more):
    """The columns of a row that say where it was made; more: what else decides a speed there."""
    return {"machine": machine(device), **more, "commit": commit()}


def now(device):
    """Seconds of the wall's clock, after all work of a GPU has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def status_mb(key, process="self"):
    """What Linux says of a process's memory, in MB: RssAnon (backed by no file), VmRSS, VmHWM (the most so far)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def replace_rows(path, rows, keys):
    """Write rows to a CSV in the place of those that have the same values under these keys."""
    made = {tuple(str(r[k]) for k in keys) for r in rows}
    save_csv(path, [r for r in read_csv(path) if tuple(r[k] for k in keys) not in made] + rows)
