"""The door: how applications and ingest/ take files from other people, and what they write for them.

First checks of the fields of a header. A table is {name: rule}. A rule is a function of the value that
returns a bool, or the table of a header inside the header. A field whose name ends in "?" may be
missing, or null.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import reprlib
import shutil
import sys
import unicodedata
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch

from common.train import UserError, atomic

FULL = "can't allocate memory|out of memory"  # torch's words for full memory
LETTERS = 100  # of a name
JOINER = "\u200d"  # makes one emoji of several


def shown(text):
    """Text of a file for a terminal: what is neither printable nor a space nor joins emoji is escaped."""
    printable = [c.isprintable() or unicodedata.category(c) == "Zs" or c == JOINER for c in text]
    return "".join(c if ok else ascii(c)[1:-1] for c, ok in zip(text, printable, strict=True))


def short(value):
    """A value for a message, its middle left out where it is long."""
    return shown(reprlib.repr(value))


# ---- rules of a header's fields ------------------------------------------------------------------


def whole(low, high=10**9):
    return lambda value: type(value) is int and low <= value <= high


def number(low=-1e6, high=1e6):
    return lambda value: type(value) in (int, float) and low <= value <= high


def one_of(*values):
    return lambda value: value in values


def list_of(rule, least=0, most=10**8):
    return lambda x: isinstance(x, list) and least <= len(x) <= most and all(map(rule, x))


def is_name(value):
    return isinstance(value, str) and 0 < len(value) <= LETTERS and shown(value) == value


def is_text(value):
    return isinstance(value, str) and len(value) <= 4096 and "\0" not in value  # no path has one


EPSILON = number(1e-12, 1)  # of a norm

# ---- a file --------------------------------------------------------------------------------------


def check_fields(header, table, path, remedy):
    """A UserError that names the first field of a header that breaks its rule."""
    if not isinstance(header, dict):
        raise UserError(f"{path} has to be a table of fields, not {short(header)}; {remedy}")
    for key, rule in table.items():
        name = key.removesuffix("?")
        value = header.get(name)
        if value is None and key != name:
            continue
        if isinstance(rule, dict):
            check_fields(value, rule, f"{path}: {name}", remedy)
        elif not rule(value):
            raise UserError(f"{path}: {name} can't be {short(value)}; {remedy}")


# ---- reading and writing ---------------------------------------------------------------------------


def regular(path):
    """-> the path, where no device and no pipe is. Those may never end, so they are not opened."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"a device or a pipe is not read: {path}; give a file or a folder")
    if path.is_file() and not os.access(path, os.R_OK):
        raise UserError(f"{path} may not be read by you; its owner can change that (chmod)")
    return path


def one_line(problem):
    """The first 80 characters of an error's message; its kind where it says nothing."""
    return " ".join(str(problem).split())[:80] or type(problem).__name__


@contextlib.contextmanager
def reading(path, what, remedy):
    """with reading(path, "checkpoint", remedy): whatever is wrong with the file is a UserError."""
    regular(path)
    try:
        yield
    except (UserError, MemoryError):  # of full memory: the file may be whole
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except Exception as problem:  # half a dozen kinds for a truncated or foreign file
        if re.search(FULL, str(problem)):
            raise
        code = re.search(r"GLOBAL (\S+)", str(problem))  # torch's, of what it did not run
        reason = f"it wants to run {code[1]}" if code else one_line(problem)
        raise UserError(f"{path} is not a whole {what} ({reason}); {remedy}") from None


def parse_table(text):
    """-> the dict in a JSON text; a ValueError for broken JSON and for another value."""
    try:
        table = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(table, dict):
        raise ValueError("it holds no table of fields")
    return table


def read_json(path, keys=(), fix="remove it and run again"):
    """-> the dict of a JSON file; a UserError with the fix where it is broken or lacks a key."""
    with reading(path, "JSON file", fix):
        table = parse_table(Path(path).read_text("utf-8"))
    missing = [key for key in keys if key not in table]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; {fix}")
    return table


def read_torch(path, remedy):
    """-> what a file of torch.save holds, on the CPU: tensors and plain values. It runs no code."""
    with reading(path, "checkpoint", remedy):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > os.path.getsize(path):
                raise ValueError(f"it is packed: {unpacked:,} bytes; torch.save packs nothing")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickles
            return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def aside(path):
    """with aside(path) as made: write made, a file or a folder, and others beside it; at the end they move.

    They are in a folder of their own, beside path. It is all that a kill leaves, and the next call
    for the path removes it. So hold a lock.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
        for made in sorted(folder.iterdir()):
            os.rename(made, path.with_name(made.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_csv(rows, path, columns=None):
    """Write rows, dicts with the same keys, atomically. columns: the keys, if there may be no row."""
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # names of files
    with atomic(path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.DictWriter(file, columns or rows[0])
        writer.writeheader()
        writer.writerows(rows)


# ---- commands --------------------------------------------------------------------------------------


@contextlib.contextmanager
def drawing(what):
    """with drawing("curves.png"): a figure that fails is a line, for the results stand already."""
    try:
        yield
    except Exception as problem:  # matplotlib raises whatever it meets
        print(f"note: {what} could not be drawn ({shown(one_line(problem))})", file=sys.stderr)


def require(extra, *libraries):
    """A library of an extra of pyproject.toml that is missing is named before the work begins."""
    for name in libraries:
        if not find_spec(name):
            raise UserError(f'{name} is missing: pip install -e ".[{extra}]"')
