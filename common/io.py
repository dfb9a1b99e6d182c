"""The user's mistakes, and files that are read and written whole or not at all."""

import argparse
import contextlib
import csv
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

# what safetensors calls the dtypes of memory maps
DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32}
FULL = "can't allocate memory|out of memory"  # torch's words for full memory


class UserError(Exception):
    """A mistake of the user, in one line with the value and the fix. `cli` exits with status 2."""


# ---- files that are read, whoever made them -----------------------------------------------------


def regular(path):
    """-> the path, where no device and no pipe is. Those may never end, so they are not opened."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"a device or a pipe is not read: {path}; give a file or a folder")
    if path.is_file() and not os.access(path, os.R_OK):
        raise UserError(f"{path} may not be read by you; its owner can change that (chmod)")
    return path


def quoted(*words):
    """Words of a command that is printed, as a shell of this system reads them."""
    words = [str(word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


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


def read_safetensors(path, remedy="remove it and make it again"):
    """-> {name: CPU tensor}, and the dict that we keep as "animask" in the header (or {})."""
    with reading(path, "file of tensors", remedy), safe_open(path, "pt") as f:
        header = parse_table((f.metadata() or {}).get("animask", "{}"))
        # Copies, because a map of the file would stay open, and Windows replaces no such file.
        return {name: f.get_tensor(name).clone() for name in f.keys()}, header  # noqa: SIM118


def read_head(f):
    """An open file of tensors -> the length of its head, the entries of its tensors, and our dict.

    Its first 8 bytes are the length of the head. The head is JSON. Then come the tensors.
    """
    room = int.from_bytes(f.read(8), "little")
    entries = parse_table(f.read(room) if room < os.path.getsize(f.name) else "")
    return room, entries, parse_table(entries.pop("__metadata__", {}).get("animask", "{}"))


def read_header(path):
    """-> the dict that we keep as "animask" in the head of such a file (or {}); no tensor is read."""
    with reading(path, "file of tensors", "remove it and make it again"), open(path, "rb") as f:
        return read_head(f)[2]


def open_tensors(path):
    """The same file as {name: memory map}, and our dict as "header"."""
    tensors = {}
    remedy = "remove it and make it again"
    with reading(path, "file of tensors", remedy), open(path, "rb") as f:
        room, entries, header = read_head(f)
        # A memory map reads whatever is there, so each tensor has to begin where the one before it
        # ends. (The library checks that, too, but reads no head of more than 100 MB.)
        end = 8 + room
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            tensors[name] = np.memmap(f, dtype, "r", end, shape)
            places = [end, end + tensors[name].nbytes]
            if [8 + room + offset for offset in entry["data_offsets"]] != places:
                raise ValueError(f"{name} lies elsewhere than its head says")
            end = places[1]
        if end != os.path.getsize(path):
            raise ValueError("it has bytes that are of no tensor")
    return tensors | {"header": header}


# ---- files that are written ----------------------------------------------------------------------


def start_of(path):
    """How the names of its temporary files begin: short, since a name has at most 255 bytes."""
    return f".{path.name[:40]}"


@functools.cache  # listed once by a command: a folder may hold a million pictures
def temporary_files(folder):
    return [*Path(folder).glob(".*.tmp")]


def remove_leftovers(path):
    """Remove temporary files of path whose process was killed while it wrote (on POSIX)."""
    start = start_of(path)
    for old in temporary_files(os.path.abspath(path.parent)) if os.name == "posix" else ():
        # Whatever else lies there is somebody's own. A process has a number as we write it.
        number = re.fullmatch(r"\.([1-9][0-9]{0,8})\.tmp", old.name.removeprefix(start))
        try:
            if number:
                os.kill(int(number[1]), 0)  # signal 0 only asks whether it is alive
        except ProcessLookupError:
            old.unlink(missing_ok=True)
        except PermissionError:  # a process of another user
            continue


def move(how, source, target):
    """os.replace or os.rename; on Windows again for a second, while a virus scanner reads a new file."""
    for wait in (0.05, 0.1, 0.2, 0.4, 0.8, 0):
        try:
            return how(source, target)
        except OSError as problem:
            busy = getattr(problem, "winerror", None) in (5, 32, 33)  # denied, shared, locked
            if not busy or not wait:
                raise
            time.sleep(wait)


@contextlib.contextmanager
def atomic(path):
    """with atomic(path) as temporary: write there, and it replaces path whole, or not at all."""
    path = Path(path)
    temporary = path.with_name(f"{start_of(path)}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        yield temporary
        with open(temporary, "r+b") as f:  # Windows syncs only what is open for writing
            os.fsync(f.fileno())
        move(os.replace, temporary, path)
    except OSError as problem:
        raise UserError(f"could not write {path}: {problem}; an earlier one is whole") from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
            move(os.rename, made, path.with_name(made.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_safetensors(tensors, path, header=None):
    """Write {name: tensor}, atomically, with a header of plain values as the entry "animask".

    Files for others have no header of ours. They say that they are PyTorch's, as transformers asks.
    """
    metadata = {"format": "pt"} if header is None else {"animask": json.dumps(header)}
    # Copies, because a format of plain arrays can't hold two names of one tensor (tied weights).
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    with atomic(path) as temporary:
        temporary.write_bytes(save(plain, metadata))


def save_text(text, path):
    """Write text, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8", "surrogateescape")  # names of files


def save_csv(rows, path, columns=None):
    """Write rows, dicts with the same keys, atomically. columns: the keys, if there may be no row."""
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # names of files
    with atomic(path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.DictWriter(file, columns or rows[0])
        writer.writeheader()
        writer.writerows(rows)


def save_json(row, path, indent=1):
    """Write a dict as JSON, atomically; indent None: all of it on one line."""
    save_text(json.dumps(row, indent=indent) + "\n", path)
