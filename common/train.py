"""What surrounds every training loop: flags, files, the machine, optimizer and schedule, log and state.

Plain functions, and one class for what holds state over a loop. No trainer: a stage's loop stays in
the stage, where it can be read.
"""

import argparse
import contextlib
import ctypes
import errno
import functools
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import distributed
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent  # the program's folder
# Of state.pt, model.safetensors and head.safetensors: each holds tensors under the names of the code. 1 had
# public names, and parts in files of their own.
FORMAT = 2
LOG_EVERY = 10  # steps
SAVE_EVERY = 120  # seconds: about what a killed run loses
UNSAVED = {"resume", "given", "again", "wandb"}  # flags of one start, and not of the run
NOT_IN_NAME = {"out", "data", "device"} | UNSAVED  # of a run's folder
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)  # of an OSError: it may not be written
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of matrix products
# what safetensors calls the dtypes of memory maps
ARRAYS = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32}


# ---- the command line ----------------------------------------------------------------------------


class UserError(Exception):
    """A mistake of the user, in one line with the value and the fix. `cli` exits with status 2."""


AT_END = contextlib.ExitStack()  # what a command lets go of when it ends


def cli(main):
    """Run a stage's main; a mistake of the user becomes one line on stderr and exit status 2."""
    # A second %run in a notebook has none, and processes that packing starts ask for it.
    vars(sys.modules["__main__"]).setdefault("__spec__", None)
    try:
        main()
    except (UserError, OSError, torch.OutOfMemoryError) as problem:
        line = line_of(problem)
        if line is None:
            raise
        tqdm.write(f"error: {line}", file=sys.stderr)  # on a line of its own, beside a bar
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        AT_END.close()


def line_of(problem):
    """What an exception asks of the user, in one line, or None where only a traceback can help."""
    if isinstance(problem, torch.OutOfMemoryError):
        fix = "a smaller --batch-size needs less, and so does a smaller --model"
        return f"{str(problem).splitlines()[0]}; {fix}"
    if isinstance(problem, UserError):
        return str(problem)
    folder = Path(problem.filename or "").parent
    if problem.errno not in CLOSED or os.access(folder, os.W_OK):
        return None
    # A folder of somebody else's, or a disk that is only read.
    fix = f"give --out a folder of yours, or where there is no --out, a copy: {copied(folder)}"
    return f"{folder} may not be written by you; {fix}"


def copied(folder):
    """The command that makes a copy of a folder, which may be written where the folder may not."""
    return f"cp -r {quoted(folder)} NEW && chmod -R u+w NEW"


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError. `given` in the namespace are the flags unlike their defaults."""

    def __init__(self, manual=None, **options):
        about = {"description": manual, "allow_abbrev": False}
        about["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(**about | options)

    def error(self, message):
        raise UserError(message.removeprefix("argument ").replace(": ", " ", 1))

    def parse_known_args(self, args=None, namespace=None):
        flags, rest = super().parse_known_args(args, namespace)
        named = [action.dest for action in self._actions if action.option_strings]
        given = {k for k in named if getattr(flags, k, None) != self.get_default(k)}
        flags.given = given - {"help"}
        return flags, rest


def add_flags(add, reports=True):
    """Flags of all stages that train. add: add_argument of a parser; reports: on a split."""
    if reports:
        add("--split", default="val", choices=["val", "dev", "test"], help="split that is reported")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--resume", metavar="RUN", help="go on with this run, under its saved flags")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of matrix products")
    add(
        "--wandb",
        action="store_true",
        help="send the numbers of log.jsonl to Weights & Biases, too",
    )


def between(low, high, kind=float):
    """-> an argparse type: a number of this kind in [low, high]."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be a number from {low:g} to {high:g}")
        return value

    return number


def at_least(low, kind=int):
    """-> an argparse type: a number of this kind, `low` or more."""
    return between(low, 10**9, kind)


def parse_keys(text, choices, flag):
    """ "lora:r=4,alpha=8" -> ("lora", {"r": 4, "alpha": 8}): a name, and values for its keys.

    choices {name: {key: default}}: a value gets its default's type, and is a number where that is None.
    """
    name, _, pairs = text.partition(":")
    if name not in choices:
        raise UserError(f"{flag} {name} is unknown; choose from {', '.join(choices)}")
    values = dict(choices[name])
    for pair in filter(None, pairs.split(",")):
        key, _, value = pair.partition("=")
        if key not in values:
            raise UserError(f"{flag} {name} has no key {key!r}; it has {', '.join(values)}")
        kind = {bool: int, type(None): float}.get(type(values[key]), type(values[key]))
        try:
            values[key] = kind(value)
        except ValueError:
            raise UserError(f"{flag} {text}: {value!r} must be a {kind.__name__}") from None
    return name, values


def set_defaults(flags, **defaults):
    """Defaults that depend on the machine, the model or the method: flags not given take them."""
    for name, value in defaults.items():
        if name not in flags.given:
            setattr(flags, name, value)


def run_name(flags, *first, only=None):
    """ "toon-mask-attn_high-seed-1": what a run is called, by the flags that were given, or some only."""
    given = flags.given - NOT_IN_NAME if only is None else flags.given & only
    words = [f"{name}-{getattr(flags, name)}" for name in vars(flags) if name in given]
    return re.sub(r"[^\w.-]+", "-", "-".join([*first, *words]))


def refuse_useless(names, where):
    """Nothing that was given is ignored. names: the given flags that nothing would read."""
    if names:
        name = min(names).replace("_", "-")
        raise UserError(f"--{name} has no effect {where}; leave it out")


def refuse_overwrite(paths, fix="choose another --out"):
    """Nothing that exists is overwritten: the line says what to do instead."""
    for path in paths:
        if os.path.lexists(path):
            raise UserError(f"{path} is there already; {fix}")


def take_saved_flags(flags, *free):
    """--resume RUN goes on in that folder, under its saved flags; `free` ones may be given anew.

    Without it, a stage that has an ENCODER among its flags needs one.
    """
    if not flags.resume:
        if "encoder" in flags and not flags.encoder:
            raise UserError("give an ENCODER: runs/NAME, weights/toon or a checkpoint")
        return
    path = Path(flags.resume) / "state.pt"
    if not path.exists():
        raise UserError(f"--resume {flags.resume} has no state.pt; give a run that has one")
    # Only tensors and plain values are read (weights_only), and no code of a file is run.
    state = torch.load(path, map_location="cpu", weights_only=True)
    check_format(state, path)
    saved = state["config"]
    given = flags.given - {"resume", "device", "wandb", *free}
    refuse_useless(given, "beside --resume, which takes the flags of the run")
    for name in saved.keys() - flags.given:
        setattr(flags, name, saved[name])
    flags.given |= saved.keys()  # as if they stood on the command line again
    flags.out = flags.resume


def check_format(header, path):
    """A UserError if an older version of this code wrote a file; header: what the file says of itself."""
    if header.get("format") != FORMAT:
        raise UserError(f"{path} was made by an older version; train again")


def quoted(*words):
    """Words of a command that is printed, as a shell reads them."""
    return shlex.join(map(str, words))


def started_as():
    """What follows `python` to start this script again: its path, or -m apps.tags of one in a folder."""
    script = Path(sys.argv[0])
    if script.parent.name in ("apps", "ingest", "lab"):
        return ["-m", f"{script.parent.name}.{script.stem}"]
    return [script.name]


def command():
    """The command line that this is, for results."""
    return quoted("python", *started_as(), *sys.argv[1:])


def progress(items=None, name=None, total=None, **options):
    """tqdm's bar; where output is piped, it is written every ten seconds."""
    if not sys.stderr.isatty():
        options |= {"mininterval": 10, "ascii": True}
    return tqdm(items, name, total, **options)


# ---- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path):
    """with atomic(path) as temporary: write there, and it takes the name. A kill leaves the old file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a kill; in a shared folder, perhaps of somebody else's
    yield temporary
    os.replace(temporary, path)


def save_safetensors(tensors, path, header=None):
    """Write {name: tensor} with a header of plain values, the entry "animask"; without one for others."""
    metadata = {"format": "pt"} if header is None else {"animask": json.dumps(header)}
    # Copies, because a format of plain arrays can't hold two names of one tensor (tied weights).
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    with atomic(path) as temporary:
        temporary.write_bytes(save(plain, metadata))  # save_file would let nobody else read it


def read_head(path, remedy="give a file that is there"):
    """The head of a file of tensors -> {name: where it is}, our dict in it (or {}), and its length in bytes."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; {remedy}")
    with open(path, "rb") as file:
        # The first 8 bytes are the length of the head. The head is JSON. Then come the tensors.
        room = int.from_bytes(file.read(8), "little")
        if room > os.path.getsize(path):
            raise UserError(f"{path} is no whole file of tensors; {remedy}")
        text = file.read(room)
    try:
        head = json.loads(text)
        ours = json.loads(head.pop("__metadata__", {}).get("animask", "{}"))
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path} is no file of tensors; {remedy}") from None
    return head, ours, 8 + room


def read_safetensors(path, remedy="give a file that is there"):
    """-> {name: CPU tensor}, and the dict that we keep as "animask" in the header (or {})."""
    _, header, _ = read_head(path, remedy)
    try:
        return load(Path(path).read_bytes()), header
    except SafetensorError as problem:
        raise UserError(f"{path} is no whole file of tensors ({problem}); {remedy}") from None


def read_header(path):
    """-> our dict in the head of such a file (or {}); no tensor is read."""
    return read_head(path)[1]


def open_tensors(path):
    """The same file as {name: memory map}, and our dict as "header": only the rows that are used are read."""
    head, header, start = read_head(path)
    tensors = {"header": header}
    for name, entry in head.items():
        # "c": a private map, of which writes change nothing in the file. Disks in a network may have no other.
        place = {"offset": start + entry["data_offsets"][0], "shape": tuple(entry["shape"])}
        tensors[name] = np.memmap(path, ARRAYS[entry["dtype"]], "c", **place)
    return tensors


def save_text(text, path):
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8", "surrogateescape")  # names of files


def save_json(row, path, indent=1):
    save_text(json.dumps(row, indent=indent) + "\n", path)


# ---- the machine ---------------------------------------------------------------------------------


def open_machine(flags):
    """--device and --dtype -> the device, autocast, and lines that say what is used, and why."""
    device = pick_device(flags.device)
    flags.dtype, reason = pick_dtype(flags.dtype, device)
    lines = f"machine  {machine(device)}\n         {flags.dtype}: {reason}"
    return device, autocast_of(device, flags.dtype), lines


def pick_device(name):
    """ "auto", "cpu", "cuda", "cuda:1", "mps" -> torch.device."""
    # glibc gives large blocks back to the system after each step, and asks for them again in the next:
    # 14 % of a step's time on a CPU (results/TRIED.md). Elsewhere there is no mallopt.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no block by mmap
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as problem:
        raise UserError(f"--device {name}: {str(problem).splitlines()[0]}") from None


def has_fast_bf16(device):
    """Whether matrix products are faster in bf16: on GPUs since Ampere, and on CPUs that have units for it."""
    # Asked, and not timed: on a busy machine a stopwatch would decide otherwise today than tomorrow.
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Other CPUs know bf16, too, but compute in fp32, and then it takes longer. Of ARM's we have timed none.
    can = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(can.get(name) for name in ("avx512_bf16", "amx_bf16"))


def pick_dtype(name, device):
    """ "auto", "bf16", "fp32" -> (a key of DTYPES, the reason). Weights stay fp32."""
    if name != "auto":
        return name, "as --dtype or the resumed run says"
    fast = has_fast_bf16(device)
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


@functools.cache
def commit(checkout=ROOT):
    """The commit of this code, for results: "2efc3a8", and "2efc3a8-dirty" after an edit."""
    git = ["git", "-C", os.fspath(checkout), "describe", "--always", "--dirty"]
    try:
        return subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "no git"


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


# ---- optimizer, schedule, random numbers ---------------------------------------------------------


def make_optimizer(model, lr, weight_decay, betas=(0.9, 0.95)):
    """AdamW in one fused pass. Weights of one dimension, or named *_token, are not decayed."""
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
    for group in optimizer.param_groups:
        group["lr"] = lr


def seeded(*numbers):
    """A CPU generator for numbers such as (seed, epoch, step): other numbers give independent draws.

    But zeros at the end of four numbers or fewer do not count: (1, 0) gives the draws of (1,).
    """
    # torch takes all 64 bits, but runs keep their draws only while this number stays what it was.
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator().manual_seed(int(seed))


# ---- what surrounds a loop -----------------------------------------------------------------------


def read_log(path):
    """log.jsonl -> list of rows; a last line that a kill cut short is left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def cost_of_steps(log, batch_size):
    """-> the median time of a step in ms and the most memory in MB."""
    steps = [row for row in read_log(log) if "loss" in row]
    speed = torch.tensor([row["images_per_s"] for row in steps]).median().item()
    memory = max(row["memory_mb"] for row in steps)
    return {"step_ms": round(1000 * batch_size / speed, 2), "peak_memory_mb": memory}


class Run:
    """What surrounds a training loop: log.jsonl, state.pt, the bar, Ctrl-C.

    parts: {name: an object with state_dict and load_state_dict}, all of them saved in state.pt.
    total, per_epoch: steps. With torchrun only the first process writes.
    """

    def __init__(self, flags, parts, total, per_epoch, device):
        self.out = Path(flags.out)
        self.path, self.log_path = self.out / "state.pt", self.out / "log.jsonl"
        self.device, self.parts, self.total, self.per_epoch = device, parts, total, per_epoch
        self.config = {k: v for k, v in vars(flags).items() if k not in UNSAVED}
        self.batch_size = flags.batch_size  # images of a step
        self.step = 0
        self.losses, self.norms = [], []  # since the last row of the log
        self.start = self.saved = self.since = time.perf_counter()
        self.resumes, self.wandb = bool(flags.resume), getattr(flags, "wandb", False)
        # The command that goes on after a stop; some have a better one.
        own = quoted("python", *started_as(), "--resume", self.out)
        self.again = getattr(flags, "again", own)
        self.commit = commit()
        self.writes = not distributed.is_initialized() or distributed.get_rank() == 0
        # Ctrl-C, or SIGTERM of a cluster, is asked for between steps: within one, half of the weights
        # would be those of the next. A second one kills.
        self.stop = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, _):
        self.stop.append(signal.Signals(number))
        signal.signal(number, signal.default_int_handler)

    def resume_or_begin(self):
        """Go on from state.pt, or begin; then the bar can run.

        Without --resume, too, a run that was stopped goes on where its own command is given again.
        """
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if not self.resumes:
                self.check_own(state)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step = state["step"]
            # The clock goes on as if there had been no pause, so that seconds can be compared.
            self.start -= state["seconds"]
        if self.writes:
            rows = read_log(self.log_path) if self.path.exists() else []
            # Rows that were logged after the state leave the log: their steps are made again.
            rows = [row for row in rows if row["step"] <= self.step]
            save_text("".join(json.dumps(row) + "\n" for row in rows), self.log_path)
        if self.wandb and self.writes:
            import wandb

            self.wandb = wandb.init(project="animask", name=self.out.name, config=self.config)
        self.bar = progress(
            total=self.total, initial=self.step, unit="step", disable=not self.writes
        )

    def check_own(self, state):
        """A UserError unless the same flags have begun this run, and it has not ended.

        The flags of some stages hold the digest of their data, too.
        """
        fix = "choose another --out"
        if state.get("config") != self.config:
            go_on = f"{self.again} goes on with it"
            raise UserError(f"{self.out} is there already, begun otherwise; {fix}; {go_on}")
        if state["step"] == self.total:
            raise UserError(f"{self.out} is there already, and has ended; {fix}")
        print(f"goes on  with step {state['step']} of {self.out}, which this command has begun")

    def save(self):
        """Write state.pt."""
        state = {
            "format": FORMAT,
            "config": self.config,
            "step": self.step,
            "seconds": self.seconds(),
        }
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        with atomic(self.path) as temporary:
            torch.save(state, temporary)
        self.saved = time.perf_counter()

    def log(self, **row):
        """A line of log.jsonl, with step and time."""
        if not self.writes:
            return
        row = {"step": self.step, **row, "seconds": self.seconds()}
        with open(self.log_path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=self.step)
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
        if not (losses + norms).isfinite().all():
            fix = "try a smaller learning rate, or --dtype fp32"
            raise UserError(f"the loss is not finite at step {self.step}, or just before; {fix}")
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
        if self.losses:  # a state keeps no losses, so it follows a row of the log
            return
        ends = self.stop or self.step == self.total
        if self.writes and (ends or time.perf_counter() - self.saved > SAVE_EVERY):
            self.save()
        if ends:
            self.bar.close()
        if self.stop:
            print(
                f"stopped by {self.stop[0].name} at step {self.step}, saved; go on with: {self.again}"
            )
            sys.exit(128 + self.stop[0])
        self.since = time.perf_counter()  # nor is the saving part of their time

    def seconds(self):
        """Of the whole run, the time before it was resumed included."""
        return round(time.perf_counter() - self.start, 2)
