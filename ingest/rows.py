"""Tensors that grow row by row into a safetensors file: memory does not grow with the data set."""

import json
import math

import numpy as np

from common.io import DTYPES, atomic


def write_rows(path, planes, n, rows, header, room=None):
    """Stream rows of several tensors into a safetensors file, atomically, in constant memory.

    planes {name: (dtype's name, shape of one row)}, in the order of the file. rows yields {name:
    array (b, ...)}, n rows in all. If fewer come, the later planes move up at the end.
    header: called after the last row -> dict. room: bytes for the head, if it may still grow.
    """
    size = {}  # bytes of one row
    for name, (dtype, shape) in planes.items():
        size[name] = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    room = room or -(-len(file_head(planes, size, n, header())) // 8) * 8
    start, end = {}, 8 + room
    for name in planes:
        start[name] = end
        end += n * size[name]
    count = 0
    with atomic(path) as temporary, open(temporary, "w+b") as f:
        for chunk in rows:
            for name, row in chunk.items():
                f.seek(start[name] + count * size[name])
                f.write(np.ascontiguousarray(row).data)
            count += len(row)
        end = 8 + room
        for name in planes:
            end = move(f, start[name], end, count * size[name])
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
    """Move `count` bytes of a file from `start` back to `to` -> where they end now."""
    for i in range(0, count if start > to else 0, step):
        f.seek(start + i)
        chunk = f.read(min(step, count - i))
        f.seek(to + i)
        f.write(chunk)
    return to + count
