"""Mistakes of the user, and files that are read and written whole or not at all.

Imports nothing of ours, and torch only where it is needed: the packing half of data.py starts
without it.
"""

import contextlib
import json
import math
import os
import shutil
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

# Of Pillow's 40 formats; among the others is EPS, which it gives to Ghostscript to be run.
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
FORMATS += ["AVIF"] * (find_spec("PIL.AvifImagePlugin") is not None)  # from Pillow 11.3
warnings.simplefilter("error", Image.DecompressionBombWarning)  # more than 89 megapixels: refused

try:
    import fcntl
except ImportError:  # there is none on Windows, and so no lock
    fcntl = None


class UserError(Exception):
    """A mistake of the user: one line with the value and the fix. The stage prints it and exits
    with status 2.
    """


def remove_leftovers(path):
    """Temporary files of path whose process was killed while it wrote. Windows has no harmless
    question to ask.
    """
    for old in path.parent.glob(f".{path.name}.*.tmp") if os.name == "posix" else ():
        try:
            os.kill(
                int(old.name.split(".")[-2]), 0
            )  # signal 0 asks only whether the process is there
        except (ProcessLookupError, ValueError):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        except OSError:  # it is somebody else's
            continue


@contextlib.contextmanager
def atomic(path):
    """with atomic(path) as temporary: write there; it takes path's place whole, or not at all
    (fsync, then rename).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        yield temporary
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)  # some writers keep a new file to themselves
        with open(temporary, "r+b") as f:  # Windows syncs only what is open for writing
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        free = (
            shutil.disk_usage(
                next(p for p in Path(os.path.abspath(path)).parents if p.is_dir())
            ).free
            / 2**20
        )
        raise UserError(
            f"could not write {path} ({free:.0f} MB free): {problem}; "
            "what stood there before is whole"
        ) from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---- locks: one process writes --------------------------------------------------------------------


def lock_beside(path):
    """The lock file of a file, or of a folder that is not there yet."""
    path = Path(os.path.abspath(path))  # "." has a name, too
    return path.parent / f".{path.name}.lock"


@contextlib.contextmanager
def locked(path, wait=False):
    """Hold a lock file, and remove it at the end -> its descriptor. If another process holds it,
    that is a UserError, or this one waits.

    The system ends a lock with its process: the file of a process that was killed locks nothing.
    """
    if fcntl is None:
        yield None
        return
    path = Path(path)
    created = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_locked(path, wait)
    try:
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        yield file
    finally:
        path.unlink(missing_ok=True)  # before it is let go: who waits for this file looks again
        os.close(file)
        if created:
            with contextlib.suppress(OSError):  # it holds something by now
                path.parent.rmdir()


def open_locked(path, wait):
    """-> the descriptor of a lock file that is locked, and still the one of this name."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(file, path, wait)
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:  # who held it has just removed it
            pass
        except UserError:
            os.close(file)
            raise
        os.close(file)


def lock(file, path, wait):
    """Lock an open file. A file system without locks locks nothing."""
    name = path.name.removesuffix(".lock").removeprefix(".")
    what = path.with_name(name) if name else path.parent
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(
                f"{what} is being written by another process (pid {os.read(file, 20).decode()}); "
                "wait, or choose another --out"
            ) from None
        print(f"waiting for a process that still writes to {what}", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return


# ---- safetensors: eight bytes, the length of the head; the head, JSON; the tensors one after the o

DTYPES = {
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
}  # of rows
BYTES = {"BOOL": 1, "I8": 1, "BF16": 2, "I16": 2, "U16": 2, "U32": 4, "F64": 8, "U64": 8} | {
    name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()
}  # of one number


def parse_json(text):
    """-> the value; JSON that is nested too deep is a ValueError, as all other broken JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_table(text):
    """The same; what is no table of fields is a ValueError."""
    found = parse_json(text)
    if not isinstance(found, dict):
        raise ValueError("it holds no table of fields")
    return found


def not_whole(path, problem, remedy):
    """The UserError for a file that is missing or broken; remedy: what to do about it."""
    if isinstance(problem, FileNotFoundError):
        return UserError(f"{path} does not exist; {remedy}")
    return UserError(
        f"{path} is not a whole file of tensors ({' '.join(str(problem).split())[:80]}); {remedy}"
    )


def read_safetensors(path, remedy="remove it and make it again"):
    """-> ({name: CPU tensor}, what our entry "animask" of its header says: a dict, empty in other
    people's files).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(regular(path), "pt") as f:
            header = parse_table((f.metadata() or {}).get("animask", "{}"))
            return {name: f.get_tensor(name) for name in f.keys()}, header  # noqa: SIM118 (a file, not a dict)
    except (SafetensorError, OSError, ValueError) as problem:
        raise not_whole(path, problem, remedy) from None


def read_header(path, remedy="remove it and make it again"):
    """The same without reading a tensor -> ({name: (dtype's name, shape, first byte in the file)},
    "animask" or {}).
    """
    try:
        with open(regular(path), "rb") as f:
            room = int.from_bytes(f.read(8), "little")
            size = os.fstat(f.fileno()).st_size - 8 - room  # of the tensors
            entries = parse_table(f.read(room) if size >= 0 else "")
        header = parse_table(entries.pop("__metadata__", {}).get("animask", "{}"))
        return {name: place_of(e, 8 + room, size) for name, e in entries.items()}, header
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise not_whole(path, problem, remedy) from None


def place_of(entry, start, size):
    """A tensor in a file's head -> (dtype's name, shape, its first byte in the file).

    The tensors begin at `start` and take `size` bytes; one that does not fit there is a ValueError.
    """
    shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"a tensor of shape {shape}")
    if last > size or last - first != math.prod(shape) * BYTES[entry["dtype"]]:
        raise ValueError(f"a tensor of shape {shape} takes {last - first} bytes of {size}")
    return entry["dtype"], shape, start + first


def save_safetensors(tensors, path, header=None):
    """Write {name: tensor} and, as the entry "animask", a header of plain values, atomically.

    A file for others, without a header of ours, says that it is PyTorch's: transformers asks for
    that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {"format": "pt"} if header is None else {"animask": json.dumps(header)}
    with atomic(path) as temporary:
        try:
            save_file(
                {k: x.detach().cpu().contiguous() for k, x in tensors.items()}, temporary, about
            )
        except SafetensorError as problem:
            raise OSError(str(problem)) from problem


def write_rows(path, planes, n, rows, header, room=None):
    """Stream rows of several tensors into a safetensors file, atomically: memory does not grow with
    them.

    planes {name: (dtype's name, shape of one row)}, in the order of the file. rows yields {name:
    array (b, ...)}, n rows in all: each goes straight to its place. If fewer than n come, the later
    planes move up at the end. header: a function that is called after the last row -> dict; room:
    bytes for the file's head, if it may still grow.
    """
    size = {
        p: math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        for p, (dtype, shape) in planes.items()
    }
    room = room or -(-len(file_head(planes, size, n, header())) // 8) * 8
    start = dict(
        zip(planes, (8 + room + n * np.cumsum([0, *size.values()])).tolist(), strict=False)
    )
    count = 0
    with atomic(path) as temporary, open(temporary, "w+b") as f:
        for chunk in rows:
            for p, row in chunk.items():
                f.seek(start[p] + count * size[p])
                f.write(np.ascontiguousarray(row).data)
            count += len(row)
        end = 8 + room
        for p in planes:
            end = move(f, start[p], end, count * size[p])
        f.truncate(end)
        f.seek(0)
        head = file_head(planes, size, count, header())
        assert len(head) <= room
        f.write(room.to_bytes(8, "little") + head.ljust(room))


def file_head(planes, size, n, header):
    """The head of a file of n rows, as JSON."""
    entries, at = {"__metadata__": {"animask": json.dumps(header)}}, 0
    for p, (dtype, shape) in planes.items():
        entries[p] = {"dtype": dtype, "shape": [n, *shape], "data_offsets": [at, at + n * size[p]]}
        at += n * size[p]
    return json.dumps(entries).encode()


def move(f, start, to, count, step=2**24):
    """Move `count` bytes of a file from `start` forward to `to` -> where they end now."""
    for i in range(0, count if start > to else 0, step):
        f.seek(start + i)
        chunk = f.read(min(step, count - i))
        f.seek(to + i)
        f.write(chunk)
    return to + count


# ---- files of other people ------------------------------------------------------------------------


def regular(path):
    """-> the path, where no device and no pipe is. Those may never end, so they are not opened."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"a device or a pipe is not read: {path}; give a file or a folder")
    return path


def open_picture(file):
    """A path or an open file -> Pillow's image, whose pixels are not decoded yet.

    Raises what Pillow raises: UnidentifiedImageError for another format, DecompressionBombWarning
    for a picture of more than 89 megapixels.
    """
    return Image.open(file, formats=FORMATS)


def check_size(path):
    """A .pth that unpacks to more than it is, as a deflated one may, is refused before it is read."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > Path(path).stat().st_size:
            raise ValueError(
                f"it is packed, and takes {unpacked:,} bytes; torch.save packs nothing"
            )


# ---- small files ---------------------------------------------------------------------------------


def read_json(path, keys=(), fix="remove it and run again"):
    """-> the dict of a JSON file of ours; one that is broken, or lacks one of the keys, is a
    UserError with the fix.
    """
    try:
        found = parse_json(regular(path).read_text())
    except (OSError, ValueError) as problem:
        raise UserError(
            f"{path} can't be read ({' '.join(str(problem).split())[:80]}); {fix}"
        ) from None
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        raise UserError(
            f"{path} is not what we write there: it lacks {', '.join(keys) or 'everything'}; {fix}"
        )
    return found


def save_text(text, path):
    """Write text, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text)


def save_json(row, path, indent=1):
    """Write a dict as JSON, atomically; indent None: all of it on one line."""
    save_text(json.dumps(row, indent=indent) + "\n", path)
