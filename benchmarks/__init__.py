"""What the benches share: where a row was made, where rows go, clocks, and the memory that a process holds."""

import time
from pathlib import Path

import torch

from common.train import commit, machine
from kernels import triton

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OUT = Path("runs/bench")  # results/ is written where it is named
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
    """What Linux says of a process's memory, in MB: RssAnon (backed by no file), VmRSS, VmHWM (the
    most so far).
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024
