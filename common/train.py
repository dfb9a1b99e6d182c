"""What stands around every training loop: flags, device and dtype, optimizer, log, checkpoint.

Plain functions, no trainer: a stage's loop stays in the stage, where it can be read.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import time
import timeit
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import numpy as np
import torch
from torch import distributed

from common.command import (
    at_least,
    progress,
    refuse_overwrite,
    refuse_useless,
    started_as,
)
from common.fields import TEXT, check_fields, number, shown, whole
from common.io import UserError, atomic, parse_table, quoted, read_torch, reading, save_text

LOG_EVERY = 10  # steps
CODE = ("*.py", "common/*.py", "kernels/*.py", "apps/*.py", "ingest/*.py", "lab/*.py")
OTHERS_STREAM = 1 << 21  # seeds what asks no generator of ours; smaller numbers are other streams
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of matrix products
SAVE_EVERY = 120  # seconds: about what a killed run loses
RESULTS = (".pt", ".jsonl", ".safetensors", ".json", ".png")  # a new run overwrites none of these
UNSAVED = {"log", "resume", "given"}  # of one start, and not of the run
# On an M1 or M2, torch 2.13 adds up 32,767 rows or more wrongly, as the gradient of a weight does over
# all tokens of a step (github.com/pytorch/pytorch/issues/177116, 195163).
METAL_ROWS = 32_766
STATE = {"config": {}, "step?": whole(0), "seconds?": number(0, 1e9), "commit?": TEXT}
NO_CUDA = "an NVIDIA driver is here that torch can't use; update it, or install a torch for it"
ANEW = "remove the folder of the run, or choose another --out"

# ---- flags of all stages that train --------------------------------------------------------------


def add_flags(add, reports=True):
    """add: the method add_argument of a parser, or of a group of it; reports: on a split."""
    if reports:
        add("--split", default="val", choices=["val", "dev", "test"], help="split that is reported")
    add("--seed", type=at_least(0), default=0, help="of all random numbers")
    add("--resume", metavar="RUN", help="go on with this run, under its saved flags")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of matrix products")
    add("--log", type=trackers, default=(), metavar="NAMES", help="tensorboard,wandb")


def trackers(text):
    """An argparse type: "tensorboard,wandb" -> the names, if their packages are there."""
    names = text.split(",")
    for name in names:
        if name not in ("tensorboard", "wandb") or not find_spec(name):
            raise UserError(f"--log {text} must be tensorboard or wandb, and installed")
    return names


def take_saved_flags(flags, *free):
    """--resume RUN goes on in that folder, under its saved flags; `free` ones may be given anew.

    -> the flags that were saved
    """
    if hasattr(flags, "encoder") and bool(flags.encoder) == bool(flags.resume):
        raise UserError("give an ENCODER, such as weights/toon, or --resume RUN, which has its own")
    if not flags.resume:
        return {}
    path = Path(flags.resume) / "state.pt"
    if not path.exists():
        raise UserError(f"--resume {flags.resume} has no state.pt; give a run that has one")
    saved = load_state(path)["config"]
    if unknown := sorted(vars(flags).keys() - saved.keys() - UNSAVED):
        why = f"which has no --{unknown[0].replace('_', '-')}"
        raise UserError(
            f"{flags.resume} is a run of another command or version, {why}; give its own"
        )
    given = flags.given - {"resume", "device", "log", *free}
    refuse_useless(given, "beside --resume, which takes the flags of the run")
    for name, value in saved.items():
        if name not in flags.given:
            setattr(flags, name, value)
    flags.given |= saved.keys()  # as if they stood on the command line again
    flags.out = flags.resume
    return saved


def same_as_begun(flags, name, now, what, fix="put the old one back"):
    """What a run began with, such as its data, is saved among its flags; a UserError if it has changed."""
    if getattr(flags, name, now) != now:
        raise UserError(
            f"{what} has changed since {flags.out} began, or other code began it; {fix}"
        )
    setattr(flags, name, now)


# ---- the machine ---------------------------------------------------------------------------------


def open_machine(flags):
    """--device and --dtype -> the device, autocast, and lines that say what is used, and why."""
    device = pick_device(flags.device)
    flags.dtype, reason = pick_dtype(flags.dtype, device)
    lines = f"machine  {machine(device)}\n         {flags.dtype}: {reason}"
    return device, autocast_of(device, flags.dtype), lines


def pick_device(name):
    """ "auto", "cpu", "cuda", "cuda:1", "mps" -> torch.device."""
    keep_freed_memory()  # here, because every stage asks for a device before its first large tensor
    mps = int(torch.backends.mps.is_available())
    counts = {"cuda": torch.cuda.device_count(), "mps": mps, "cpu": 1}
    there = [kind for kind, count in counts.items() if count]
    driver = Path("/proc/driver/nvidia/version").exists() or os.name == "nt" and which("nvidia-smi")
    if there == ["cpu"] and name == "auto" and driver:
        print(f"warning  {NO_CUDA}: torch {torch.__version__}")
    device = None
    with contextlib.suppress(RuntimeError):  # torch's, at a word that names no device
        device = torch.device(there[0] if name == "auto" else name)
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        raise UserError(f"--device {name} is not on this machine; there is: {', '.join(there)}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for all that names no device, such as a stream
    return device


def warn_of_metal(rows, device):
    """A line where a step has more tokens, its `rows`, than an M1 or M2 adds up rightly."""
    if device.type == "mps" and rows > METAL_ROWS:
        fix = "give a smaller --batch-size"
        print(
            f"warning  a step has {rows} tokens, over {METAL_ROWS}: on an M1 or M2, gradients are wrong; {fix}"
        )


def keep_freed_memory(heaps=None):
    """Let glibc keep large blocks for the next step: 14 % of a step's time on a CPU (results/TRIED.md)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # there is no glibc here
        libc = ctypes.CDLL(None)
        if heaps:
            libc.mallopt(-8, heaps)  # M_ARENA_MAX: at most so many, for all threads
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block by mmap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not trimmed under 2 GB


@functools.cache
def bf16_gain():
    """Seconds of a matrix product in fp32 over those in bf16: a CPU can have bf16, but slow."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = {"a": torch.ones(1024, 192, dtype=dtype)}
        seconds.append(min(timeit.repeat("a @ a[:192].T", globals=matrix, number=1, repeat=9)))
    return seconds[0] / seconds[1]


def pick_dtype(name, device):
    """ "auto", "bf16", "fp32" -> (a key of DTYPES, the reason). Weights stay fp32."""
    if name != "auto":
        return name, "as --dtype or the resumed run says"
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        fast = bf16_gain() > 1.3
    reason = f"bf16 is {'fast' if fast else 'not known to be fast'} on this {device.type}"
    return "bf16" if fast else "fp32", reason


def autocast_of(device, dtype):
    """-> autocast(), a context in which matrix products run in "bf16"; "fp32" changes nothing.

    With bf16 on CUDA, products that stay in fp32 are rounded to TF32, which keeps more digits than bf16.
    """
    is_bf16 = dtype == "bf16"
    torch.backends.cuda.matmul.allow_tf32 = is_bf16
    return functools.partial(torch.autocast, device.type, DTYPES[dtype], enabled=is_bf16)


def machine(device):
    """A line about the machine for logs and results."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    return f"{device.type} {name}, {torch.get_num_threads()} threads, {versions}"


@functools.cache  # an edit after the first call is not what this process runs
def commit(checkout=Path(__file__).parent.parent):
    """The commit that this code is at: results name it. After an edit, a + and a digest of the code follow."""
    git = ["git", "-C", os.fspath(checkout)]
    try:
        name = subprocess.check_output([*git, "describe", "--always"], stderr=subprocess.DEVNULL)
        ours = [f":(glob){pattern}" for pattern in CODE]
        if not subprocess.check_output([*git, "status", "--porcelain", "--", *ours]):
            return name.decode().strip()
    except (OSError, subprocess.CalledProcessError):
        name = b"no git"
    return f"{name.decode().strip()}+{digest_of(code_files(checkout))[:6]}"


def code_files(checkout):
    """Its Python files but the tests, in order."""
    paths = sorted(path for pattern in CODE for path in Path(checkout).glob(pattern))
    return [path for path in paths if path.is_file()]  # Emacs leaves links to nothing


def digest_of(paths):
    """A hash of what these files hold, one after the other."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def peak_memory_mb(device):
    """Most memory held so far in MB: of the GPU on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# ---- optimizer and schedule ----------------------------------------------------------------------


def make_optimizer(model, lr, weight_decay, betas=(0.9, 0.95)):
    """AdamW in one fused pass. Weights of one dimension, or named *_token, are not decayed. A stage sets lr."""
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[0 if is_decayed(name, p) else 1]["params"].append(p)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def is_decayed(name, p):
    """Decay limits how much a matrix can multiply its input, so it is for matrices alone."""
    # A bias multiplies nothing, and a norm whose scale went to zero would switch its layer off. MAE and
    # nanoGPT leave them, too. A token is an input, and multiplies nothing either (MAE does decay its
    # tokens).
    return p.ndim > 1 and not name.endswith("_token")


def name_unused(network, optimizer):
    """After the first step: a line names the weights that no loss reaches, so that nothing trains them."""
    # AdamW keeps a state of what had a gradient, and no other. (Plain SGD keeps none at all.)
    learns = {name: p for name, p in network.named_parameters() if p.requires_grad}
    unused = [name for name, p in learns.items() if p not in optimizer.state]
    if unused and optimizer.state:
        print(f"note     no loss reaches {', '.join(unused)}: is it used in forward?")


def lr_at(step, total, warmup, peak):
    """Linear warm-up over `warmup` steps, then half a cosine to 0 at `total`."""
    # Adam divides by the root of a mean of squared gradients, which rests on few of them at first. Full
    # steps could go far astray then (Liu et al. 2019, arXiv:1908.03265). step + 1, or the first
    # step would have a rate of 0.
    if step < warmup:
        return peak * min(1, (step + 1) / warmup)  # warmup need be no whole number
    # Large steps find the way and small ones settle. A cosine (Loshchilov and Hutter 2016,
    # arXiv:1608.03983) needs no choice of epochs at which the rate drops; but total must be known.
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_lr(optimizer, lr):
    """The learning rate of a step; a group of yours with a key "times" has so many times this rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("times", 1)


def seeded(*numbers):
    """A CPU generator for numbers such as (seed, epoch, step): other numbers give independent draws.

    But zeros at the end of four numbers or fewer do not count: (1, 0) gives the draws of (1,).
    """
    # torch takes all 64 bits, but runs keep their draws only while this number stays what it was.
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator().manual_seed(int(seed))


def seeded_step(*numbers):
    """`seeded`, for a step of a loop: dropout, or whatever else you add, begins anew with it, too."""
    # Dropout asks no generator of ours but torch's own, whose state goes on from step to step. Seeded
    # anew at each step, it need not be saved, and a resumed run draws what it would have drawn. The same
    # holds for the generators of NumPy and Python. With the seed of ours, the first dropout would repeat
    # the numbers of the crops, so they have another one.
    others = seeded(*numbers, OTHERS_STREAM).initial_seed()
    torch.manual_seed(others)
    np.random.seed(others % 2**32)
    random.seed(others)
    return seeded(*numbers)


# ---- what surrounds a loop -----------------------------------------------------------------------


def read_log(path):
    """log.jsonl -> list of rows; a last line that a kill cut short is left out."""
    text = Path(path).read_text(errors="replace") if Path(path).exists() else ""
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(parse_table(line))
    return rows


def cost_of_steps(log, batch_size):
    """-> the median time of a step in ms and the most memory in MB; nothing where the log is lost."""
    steps = [row for row in read_log(log) if "loss" in row]
    if not steps:
        return {}
    speed = torch.tensor([row["images_per_s"] for row in steps]).median().item()
    memory = max(row["memory_mb"] for row in steps)
    return {"step_ms": round(1000 * batch_size / speed, 2), "peak_memory_mb": memory}


def open_tracker(name, out, config):
    """-> a function of (numbers, step) that sends them to TensorBoard or to Weights & Biases."""
    if name == "wandb":
        import wandb

        return wandb.init(project="animask", name=out.name, dir=str(out), config=config).log
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out)

    def send(numbers, step):
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return send


def catch_signals():
    """-> a list that Ctrl-C or SIGTERM fills; the loop reads it between steps. A second one kills."""
    stop = []

    def note(number, _):
        stop.append(signal.Signals(number))
        signal.signal(number, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return stop


def load_state(path):
    """Read a state.pt of ours and check its fields."""
    state = read_torch(path, ANEW)
    check_fields(state, STATE, path, ANEW)
    return state


def refuse_results(out):
    """A UserError where a run's folder holds results, but for those of a run that made no step."""
    state = out / "state.pt"
    there = {path for path in out.glob("*.*") if path.suffix in RESULTS}
    if state in there and load_state(state).get("step") == 0:
        there -= {state, out / "log.jsonl", out / "masks.png", *out.glob("attn-*.safetensors")}
    refuse_overwrite(sorted(there))


class Run:
    """What surrounds a training loop: log.jsonl, state.pt, the bar, Ctrl-C.

    parts: {name: an object with state_dict and load_state_dict}, all of them saved in state.pt.
    total, per_epoch: steps. With torchrun only the first process writes.
    """

    def __init__(self, flags, parts, total, per_epoch, device):
        self.out = Path(flags.out)
        self.device = device
        self.path, self.log_path = self.out / "state.pt", self.out / "log.jsonl"
        self.config = {k: v for k, v in vars(flags).items() if k not in UNSAVED}
        self.parts = parts
        self.batch_size = flags.batch_size  # images of a step
        self.step = 0
        self.total = total
        self.per_epoch = per_epoch
        self.losses, self.norms = [], []  # since the last row of the log
        self.start = self.saved = self.since = time.perf_counter()
        self.resumes = bool(flags.resume)
        self.commit = commit()
        self.log_to = flags.log
        self.trackers = []
        self.stop = self.caught = catch_signals()  # with several processes, `stop` is what all know
        # Asked of torch, and not of RANK, which may be left over in a shell. Only pretrain.py starts it.
        self.writes = not distributed.is_initialized() or distributed.get_rank() == 0

    def resume_or_begin(self):
        """Go on from state.pt where flags.resume asks for it, else begin; then the bar can run."""
        if self.writes:
            from common.locks import reserve  # here, because who reads a loop needs no locks

            reserve([], self.out / ".lock")
        if self.resumes:
            self.load()
        if self.writes:
            self.cut_log() if self.resumes else self.begin()
            self.trackers = [open_tracker(name, self.out, self.config) for name in self.log_to]
        self.bar = progress(
            total=self.total, initial=self.step, unit="step", disable=not self.writes
        )

    def load(self):
        """Put what state.pt holds in its place."""
        state = load_state(self.path)
        fix = "take the code that wrote it, or choose another --out"
        wrote = state.get("commit") or self.commit
        if wrote != self.commit:
            change = f"the code of {shown(wrote)} wrote it, and that of {self.commit} goes on"
            print(f"warning  {self.path}: {change}; if that should not be, {fix}", file=sys.stderr)
        with reading(self.path, "state of such a run", fix):
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step = state["step"]
            # The clock goes on as if there had been no pause, so that seconds can be compared.
            self.start -= state["seconds"]

    def begin(self):
        """A new run refuses the files of another, and can be resumed from its first moment.

        One that failed before its first saved step is no run: the same command begins it again.
        """
        refuse_results(self.out)
        self.log_path.unlink(missing_ok=True)
        self.save()

    def cut_log(self):
        """Rows that were logged after the checkpoint leave the log."""
        # The steps after it are made again, with the same numbers: they would stand in the log twice.
        last = self.step or -1  # step 0 is evaluated again
        rows = [r for r in read_log(self.log_path) if r.get("step", math.inf) <= last]
        save_text("".join(json.dumps(row) + "\n" for row in rows), self.log_path)

    def save(self):
        """Write state.pt, atomically."""
        state = {"config": self.config, "step": self.step, "seconds": self.seconds()}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        state["commit"] = self.commit  # `load` tells if other code goes on
        # Into another file, which then takes the name: a kill at this moment leaves the old one whole.
        with atomic(self.path) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as problem:  # what torch makes of a full disk
                raise OSError(str(problem).splitlines()[0]) from problem
        self.saved = time.perf_counter()

    def log(self, **row):
        """A line of log.jsonl, with step and time; numbers go to TensorBoard or wandb, where asked."""
        if not self.writes:
            return
        row = {"step": self.step, **row, "seconds": self.seconds()}
        with open(self.log_path, "a") as file:
            file.write(json.dumps(row) + "\n")
        for send in self.trackers:
            send({k: v for k, v in row.items() if isinstance(v, int | float)}, self.step)
        self.since = time.perf_counter()  # the evaluation behind a row is no part of the next steps

    def update(self, loss, grad_norm):
        """After each optimizer step. Waits for no GPU."""
        self.step += 1
        self.bar.update()
        # loss.item() would wait until the GPU has done the step. Without it the CPU goes on to prepare
        # the next one. detach, because the graph of each loss would fill the memory; clone, because a
        # CUDA graph writes the next loss into the same place.
        self.losses.append(loss.detach().clone())
        self.norms.append(grad_norm.clone())

    @property
    def logs_now(self):
        """Whether this step gets a row: every tenth, the last before an evaluation, a stop or the end."""
        every = self.per_epoch * self.config.get("eval_every", 1)
        due = self.step % LOG_EVERY == 0 or self.step % every == 0 or self.step == self.total
        return due or bool(self.stop)

    def log_step(self, **more):
        """A row with the mean loss and gradient norm since the last one, and the speed."""
        # The only wait for the GPU, once in ten steps. So a loss that is no number is noticed here, too.
        losses, norms = torch.stack(self.losses).cpu(), torch.stack(self.norms).cpu()
        finite = (losses + norms).isfinite()
        fix = "try a smaller learning rate, or --dtype fp32"
        if not finite.all():
            step = self.step - len(losses) + 1 + finite.int().argmin().item()
            raise UserError(f"the loss is not finite at step {step}; {fix}")
        broken = [k for k, x in more.items() if isinstance(x, float) and not math.isfinite(x)]
        if broken:  # the contrastive loss has weights of its own
            raise UserError(f"{broken[0]} is not finite at step {self.step}; {fix}")
        self.losses, self.norms = [], []
        seconds = time.perf_counter() - self.since
        row = {
            "epoch": round(self.step / self.per_epoch, 4),
            "loss": losses.mean().item(),
            "grad_norm": norms.mean().item(),
            # Four digits, and not one decimal: times are divided by it, so it may not be 0.
            "images_per_s": float(f"{len(losses) * self.batch_size / seconds:.4g}"),
            "memory_mb": round(peak_memory_mb(self.device)),
        }
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        self.log(**(row | more))

    def save_if_due(self):
        """Save every two minutes, at a stop and at the end; then stop if asked to."""
        if self.losses:  # a checkpoint keeps no losses, so it follows a row of the log
            return
        ends = self.stop or self.step == self.total
        if self.writes and (ends or time.perf_counter() - self.saved > SAVE_EVERY):
            self.save()
        if ends:
            self.bar.close()
        if self.stop:
            print(f"stopped by {self.stop[0].name} at step {self.step}, saved; go on with:")
            start = "python"
            if distributed.is_initialized():  # one process alone would have the batch of all
                start = f"torchrun --nproc-per-node {distributed.get_world_size()}"
            print(f"  {start} {quoted(*started_as(), '--resume', str(self.out))}", flush=True)
            sys.exit(128 + self.stop[0])
        self.since = time.perf_counter()  # nor is the saving part of their time

    def seconds(self):
        """Of the whole run, the time before it was resumed included."""
        return round(time.perf_counter() - self.start, 2)
