"""What stands around every training loop, written once: mistakes, the machine, files, optimizer, log, checkpoint.

Plain functions, no trainer: a stage's loop stays in the stage, where it can be read.
"""

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import timeit
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from common.checkpoints import load_exactly
from common.command import claim, launched, progress, refuse_overwrite
from common.fields import check_fields, number, whole
from common.io import UserError, atomic, check_size, parse_json, save_text

try:
    import resource
except ImportError:  # there is none on Windows
    resource = None

STATE = {
    "config": {},
    "step?": whole(0),
    "seconds?": number(0, 1e9),
    "stage?": whole(0, 3),
}

# ---- the machine ---------------------------------------------------------------------------------


def pick_device(name):
    """ "auto", "cpu", "cuda", "cuda:1", "mps" -> torch.device; one that is not there is a
    UserError.

    Every stage asks here before its first large tensor, so this is also where glibc is told to keep
    freed memory.
    """
    keep_freed_memory()
    kinds = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    there = [kind for kind, yes in kinds.items() if yes]
    if name == "auto":
        return torch.device(there[0])
    if name.split(":")[0] not in there:
        raise UserError(f"--device {name} is not on this machine; there is: {', '.join(there)}")
    with contextlib.suppress(RuntimeError):  # cuda:x
        device = torch.device(name)
        if device.type != "cuda" or (device.index or 0) < torch.cuda.device_count():
            return device
    raise UserError(
        f"--device {name} is no device of this machine; try --device {name.split(':')[0]}"
    )


def keep_freed_memory():
    """Let glibc keep the blocks that it frees for the next step.

    It gives blocks over 32 MB back to the kernel, which clears new pages for the same tensors in
    every step: 15 % of the time of a ViT-S on a CPU (results/LOG.md). mallopt(3): no block by mmap,
    the heap is not trimmed under 2 GB.
    """
    set_malloc(mmap_max=0, trim_threshold=2**31 - 1)


def set_malloc(**options):
    """mallopt(3), by the names there; where there is no glibc this does nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for name, value in options.items():
            ctypes.CDLL(None).mallopt(
                {"trim_threshold": -1, "mmap_max": -4, "arena_max": -8}[name], value
            )


@functools.cache
def bf16_gain():
    """Seconds of a matrix product in fp32 over those in bf16, on this CPU; takes 10 to 30 ms.

    Instructions for bf16 (avx512_bf16) do not tell: one CPU is three times as fast with them,
    another half as fast.
    """
    setup = "import torch; a = torch.ones(1024, 192, dtype=torch.{})"
    times = [
        min(timeit.repeat("a @ a[:192].T", setup.format(t), number=1, repeat=9))
        for t in ("float32", "bfloat16")
    ]
    return times[0] / times[1]


def pick_dtype(name, device):
    """ "auto", "bf16", "fp32" -> (dtype of the matrix products, the reason). Weights and optimizer
    stay fp32.
    """
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name], "as --dtype says"
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return (
            (torch.bfloat16, "this GPU multiplies it fast")
            if fast
            else (torch.float32, "this GPU has no fast bf16")
        )
    if device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        dtype = torch.bfloat16 if bf16_gain() > 1.3 else torch.float32
        return (
            dtype,
            f"this CPU was timed, and multiplies bf16 {bf16_gain():.1f} times as fast as fp32",
        )
    return torch.float32, f"bf16 is not known to be faster on this {device.type}"


def autocast_of(device, dtype):
    """-> autocast(), a context in which matrix products run in dtype; fp32 changes nothing."""
    return functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)


def machine(device):
    """A line about the machine for logs and results."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    software = f"torch {torch.__version__}, python {platform.python_version()}"
    return f"{device.type} {where}, {torch.get_num_threads()} threads, {software}"


def commit():
    """The commit that this code is at, with a + if code was changed since: results name it."""

    def git(*words):
        with contextlib.suppress(OSError):  # there may be no git on this machine
            root = Path(__file__).parent.parent
            return subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True
            ).stdout.strip()
        return ""

    return (
        git("describe", "--always") + ("+" if git("status", "--porcelain", "--", "*.py") else "")
        or "no git"
    )


def peak_memory_mb(device):
    """Most memory held so far in MB: of the GPU on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def catch_signals():
    """-> a list that a first Ctrl-C or SIGTERM fills; the loop reads it between steps. A second one
    interrupts.
    """
    stop_signal = []

    def note(number, _):
        if stop_signal:
            raise KeyboardInterrupt
        stop_signal.append(signal.Signals(number))

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, note)
    return stop_signal


# ---- files ---------------------------------------------------------------------------------------


def save_state(state, path):
    """Write a checkpoint of tensors and plain values, atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as f:
        try:
            torch.save(state, f)
        except RuntimeError as problem:  # what torch makes of a full disk
            raise OSError(str(problem).splitlines()[0]) from problem


def load_state(path):
    """Read what `save_state` wrote. Never unpickles code: a file with anything but tensors and
    values is refused.
    """
    try:
        check_size(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as problem:  # torch.load raises half a dozen kinds for a truncated or foreign file
        reason = (str(problem).splitlines() or [type(problem).__name__])[0][:100]
        raise UserError(
            f"{path} can't be read as a checkpoint of ours ({reason}); {anew(path)}"
        ) from None
    check_fields(state, STATE, path, anew(path))
    return state


def anew(state):
    """What may be done about a run that is in the way; state: its state.pt."""
    return f"rm -r {shlex.quote(str(Path(state).parent))} removes it, another --out leaves it alone"


# ---- optimizer and schedule ----------------------------------------------------------------------


def make_optimizer(model, lr, weight_decay, betas=(0.9, 0.95)):
    """AdamW in one fused pass; biases, LayerNorms and tokens (all that is 1-D in meaning) are not
    decayed.
    """
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim < 2 or name.endswith("_token")]["params"].append(p)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def load_optimizer(optimizer, saved):
    """Take up the moments of AdamW that state.pt keeps. Its rates are set before every step, and its other numbers
    follow from the flags. Moments that do not fit their weights are a ValueError."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for weight, moments in optimizer.state.items():
        shapes = {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}
        if {name: x.shape for name, x in moments.items()} != shapes:
            raise ValueError("the optimizer's moments do not fit the weights")


def set_lr(optimizer, lr):
    """Every group of the optimizer gets this learning rate -> lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def lr_at(step, total, warmup, peak):
    """Linear warm-up over `warmup` steps, then half a cosine to 0 at `total`; set anew before every
    step.
    """
    if step < warmup:
        return peak * min(1, (step + 1) / warmup)  # warmup need be no whole number
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def seeded(*numbers):
    """A CPU generator for (seed, epoch, step, purpose): independent streams from neighbouring
    numbers.
    """
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    )


# ---- log -----------------------------------------------------------------------------------------


def read_log(path):
    """log.jsonl -> list of rows; a last line that was cut by a kill, or what is no row, is left
    out.
    """
    rows = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(parse_json(line))
    return [row for row in rows if isinstance(row, dict)]


def trackers(text):
    """An argparse type: "tensorboard,wandb" -> the names, if their packages are there."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in ("tensorboard", "wandb"):
            raise argparse.ArgumentTypeError(f"{name} is unknown; choose from tensorboard, wandb")
        if not find_spec(name):
            raise argparse.ArgumentTypeError(f"{name} is not installed: pip install {name}")
    return names


def open_tracker(name, out, config):
    """-> a function of (numbers, step) that sends them to TensorBoard or to Weights & Biases."""
    if name == "wandb":
        import wandb

        run = wandb.init(project="animask", name=out.name, dir=os.fspath(out), config=config)
        return lambda numbers, step: run.log(numbers, step=step)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out)

    def send(numbers, step):
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return send


# ---- what surrounds a loop -----------------------------------------------------------------------

LOG_EVERY = 10  # steps
KINDS_OF_RESULTS = ("state.pt", "log.jsonl", "*.safetensors", "*.json", "*.png")


class Run:
    """What surrounds a training loop: log.jsonl, state.pt, the bar, Ctrl-C. The loop stays in the stage.

    parts: {name: an object with state_dict and load_state_dict}; all of them are saved in state.pt.
    With flags.resume they go on from there, with the same bits on a CPU as a run that never stopped.
    With torchrun only the first process writes.
    """

    def __init__(self, flags, parts, total, per_epoch, device):
        self.out = Path(flags.out)
        self.config = {k: v for k, v in flags.values.items() if k not in ("log", "resume")}
        self.parts, self.device = parts, device
        self.total, self.per_epoch = total, per_epoch  # steps
        self.batch_size = flags.batch_size  # images of a step
        self.step, self.seconds_before = 0, 0.0
        self.writes = not launched() or os.environ["RANK"] == "0"
        self.path = self.out / "state.pt"
        if self.writes:
            claim([], self.out / ".lock")
        if flags.resume:
            self.load()
        elif self.writes:
            refuse_overwrite(sorted(itertools.chain(*map(self.out.glob, KINDS_OF_RESULTS))))
        if self.writes:
            self.drop_later_rows()
        names = flags.log if self.writes else ()
        self.trackers = [open_tracker(name, self.out, self.config) for name in names]
        self.stop = catch_signals()
        self.losses, self.norms = [], []
        self.start = self.last_save = time.perf_counter()
        self.save_cost = 0.0
        self.restart()
        if self.writes and not flags.resume:
            self.save()  # so that a run can be resumed from its first moment
        self.bar = progress(total=total, initial=self.step, unit="step", disable=not self.writes)

    # -- files

    def load(self):
        """Put what state.pt holds in its place."""
        state = load_state(self.path)
        try:
            for name, part in self.parts.items():
                if isinstance(part, torch.optim.Optimizer):
                    load_optimizer(part, state[name])
                elif isinstance(part, torch.nn.Module):
                    load_exactly(part, state[name], self.path)
                else:
                    part.load_state_dict(state[name])
            self.step, self.seconds_before = int(state["step"]), float(state["seconds"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
            reason = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
            raise UserError(f"{self.path} does not fit ({reason}); {anew(self.path)}") from None
        if self.step > self.total:
            raise UserError(
                f"{self.path} is at step {self.step} of {self.total}; {anew(self.path)}"
            )

    def save(self):
        """Write state.pt."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        about = {"config": self.config, "step": self.step, "seconds": self.seconds()}
        start = time.perf_counter()
        save_state(state | about, self.path)
        self.last_save = time.perf_counter()
        self.save_cost = self.last_save - start
        self.restart()

    def drop_later_rows(self):
        """The checkpoint decides where a resumed run stands: rows of later steps leave the log."""
        path = self.out / "log.jsonl"
        rows = [r for r in read_log(path) if r.get("step", math.inf) <= self.step]
        rows = rows if self.step > 0 else []  # those before a checkpoint are written again
        if self.step > 0 and not rows:
            raise UserError(f"{path} holds no row of this run any more; {anew(self.path)}")
        save_text("".join(json.dumps(row) + "\n" for row in rows), path)

    def log(self, **row):
        """A line of log.jsonl; its numbers go to TensorBoard or wandb, too, where asked."""
        if not self.writes:
            return
        row = {"step": self.step, **row}
        try:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as problem:  # a line cut short is left out when the log is read
            raise UserError(
                f"could not write {self.out}/log.jsonl: {problem.strerror}; make room, then go on "
                f"with --resume {self.out}"
            ) from None
        for send in self.trackers:
            send({k: v for k, v in row.items() if isinstance(v, int | float)}, self.step)

    # -- in the loop

    def timed(self, batches):
        """Iterate over batches, adding up the time that each takes to come."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def update(self, loss, grad_norm):
        """After each optimizer step. Waits for no GPU."""
        self.step += 1
        self.bar.update()
        self.losses.append(loss.detach())
        self.norms.append(grad_norm)

    @property
    def logs_now(self):
        """Whether this step gets a row: every tenth, an epoch's last, and the last before a stop."""
        return self.step % LOG_EVERY == 0 or self.step % self.per_epoch == 0 or bool(self.stop)

    def log_step(self, **more):
        """A row with the mean loss and gradient norm since the last one, and the speed."""
        losses, norms = (torch.stack(x).cpu() for x in (self.losses, self.norms))
        finite = losses.isfinite() & norms.isfinite()
        if not finite.all():
            first = self.step - len(losses) + 1 + int((~finite).nonzero()[0])
            raise UserError(
                f"the loss is not finite at step {first}; {self.path} is the last good state; try "
                "a smaller learning rate, or --dtype fp32"
            )
        seconds = time.perf_counter() - self.since
        row = {
            "epoch": round(self.step / self.per_epoch, 4),
            "loss": losses.mean().item(),
            "grad_norm": norms.mean().item(),
            "images_per_s": round(len(losses) * self.batch_size / seconds, 1),
            "data_wait": round(self.waited / max(1e-9, seconds), 5),
            "memory_mb": round(peak_memory_mb(self.device)),
            "seconds": self.seconds(),
        }
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        self.losses, self.norms = [], []
        self.restart()
        self.log(**(row | more))

    def save_if_due(self):
        """At a stop, at the end, and so often that saving takes 1 % of the time; then stop if asked to.

        Only just after a row was logged, for the checkpoint keeps no losses.
        """
        if self.losses:
            return
        waited = time.perf_counter() - self.last_save
        due = waited > min(100 * self.save_cost, 600)
        if self.writes and (self.stop or self.step == self.total or due):
            self.save()
        if self.stop:
            self.bar.close()
            print(
                f"stopped by {self.stop[0].name} at step {self.step}, saved; go on with:\n"
                f"  python {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(self.out))}",
                flush=True,
            )
            sys.exit(128 + self.stop[0])

    def restart(self):
        """Speed and wait are measured from now on."""
        self.waited, self.since = 0.0, time.perf_counter()

    def seconds(self):
        """Of the whole run, the time before it was resumed included."""
        return round(self.seconds_before + time.perf_counter() - self.start, 2)

    def close(self):
        """After the loop."""
        self.bar.close()
