"""Tensors that grow row by row into a safetensors file: memory does not grow with the data set."""

import contextlib
import json
import math
import shutil
import tempfile

import numpy as np

from common.train import ARRAYS, atomic


def write_rows(path, planes, n, rows, header, spare=0):
    """Stream rows of several tensors into a safetensors file, atomically, in constant memory.

    planes {name: (dtype's name, shape of one row)}, in the order of the file. rows yields {name:
    array (b, ...)}, n rows in all, or fewer. The first plane, the large one, goes where it stays;
    the others wait in files without a name. A header, header() -> dict, is asked for before the
    first row and after the last. spare: bytes by which it may grow.
    """
    room = -(-(len(file_head(planes, n, header())) + spare) // 8) * 8
    first, *others = planes
    count = 0
    with atomic(path) as temporary, open(temporary, "wb") as f, contextlib.ExitStack() as opened:
        f.seek(8 + room)
        files = {first: f}
        for name in others:
            files[name] = opened.enter_context(tempfile.TemporaryFile(dir=temporary.parent))
        for chunk in rows:
            for name, file in files.items():
                file.write(np.ascontiguousarray(chunk[name]).data)
            count += len(chunk[name])
        for name in others:
            files[name].seek(0)
            shutil.copyfileobj(files[name], f, 2**24)
        head = file_head(planes, count, header())
        assert len(head) <= room
        f.seek(0)
        f.write(room.to_bytes(8, "little") + head.ljust(room))


def file_head(planes, n, header):
    """The head of a file of n rows, as JSON."""
    entries = {"__metadata__": {"animask": json.dumps(header)}}
    start = 0
    for name, (dtype, shape) in planes.items():
        end = start + n * math.prod(shape) * np.dtype(ARRAYS[dtype]).itemsize
        entries[name] = {"dtype": dtype, "shape": [n, *shape], "data_offsets": [start, end]}
        start = end
    return json.dumps(entries).encode()
