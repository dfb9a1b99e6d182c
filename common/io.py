"""Mistakes of the user, files that are written whole or not at all, and tensors on their way to a device.

Imports nothing of ours, and torch only where it is needed: the packing half of data.py starts without it.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import shutil
import sys
from pathlib import Path


class UserError(Exception):
    """A mistake of the user: one line with the value and the fix. The stage prints it and exits with status 2."""


def cli(main):
    """Run a stage's main; a UserError becomes one line on stderr (one a process) and exit status 2."""
    with contextlib.suppress(AttributeError):  # a file's name may be no text at all
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as problem:
        rank = int(os.environ.get("RANK", 0))
        print(f"error: {problem}" if rank == 0 else f"error in process {rank}: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def atomic(path):
    """with atomic(path) as temporary: write there; it takes path's place whole, or not at all (fsync, then rename)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as f:  # Windows syncs only what is open for writing
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        free = shutil.disk_usage(next(p for p in path.resolve().parents if p.is_dir())).free / 2**20
        raise UserError(f"could not write {path} ({free:.0f} MB free): {problem}; "
                        "what stood there before is whole") from problem  # fmt: skip
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_safetensors(tensors, path, header):
    """Write {name: contiguous CPU tensor} and a header {str: str}, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, header)
        except SafetensorError as problem:
            raise OSError(str(problem)) from problem


def read_csv(path):
    """-> list of dicts; none where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def save_csv(path, rows):
    """Write rows (dicts with the same keys) as CSV, atomically."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def save_text(text, path):
    """Write text, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text)


def save_json(row, path, indent=1):
    """Write a dict as JSON, atomically; indent None: all of it on one line."""
    save_text(json.dumps(row, indent=indent) + "\n", path)


def send(x, device):
    """A CPU tensor to the device, without waiting for it: only from pinned memory does a copy to a GPU not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


# ---- flags: argparse types, and its errors in one line ---------------------------------------------------------------


def between(low, high, kind=float):
    """-> an argparse type: a finite number of this kind in [low, high]."""

    def number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"{text} must be a {'whole ' * (kind is int)}number {bounds}")
        return value

    return number


def at_least(low, kind=int):
    """-> an argparse type: a finite number of this kind, `low` or more."""
    return between(low, math.inf, kind)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError: one line, as all mistakes of a user."""

    def __init__(self, *args, **options):
        super().__init__(*args, **({"formatter_class": argparse.RawTextHelpFormatter} | options))

    def error(self, message):
        raise UserError(message.removeprefix("argument ").replace(": ", " ", 1))
