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
    room = room or -(-len(file_head(planes, n, header())) // 8) * 8
    planned, count = places(planes, n, 8 + room), 0
    with atomic(path) as temporary, open(temporary, "w+b") as f:
        for chunk in rows:
            for name, start, size in planned:
                f.seek(start + count * size)
                f.write(np.ascontiguousarray(chunk[name]).data)
            count += len(chunk[name])
        for (_, start, size), (_, to, _) in zip(
            planned, places(planes, count, 8 + room), strict=True
        ):
            move(f, start, to, count * size)
        f.truncate(to + count * size)
        f.seek(0)
        head = file_head(planes, count, header())
        assert len(head) <= room
        f.write(room.to_bytes(8, "little") + head.ljust(room))


def places(planes, n, start=0):
    """-> [(name, where its n rows start, bytes of a row)], one after the other."""
    found = []
    for name, (dtype, shape) in planes.items():
        size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        found.append((name, start, size))
        start += n * size
    return found


def file_head(planes, n, header):
    """The head of a file of n rows, as JSON."""
    entries = {"__metadata__": {"animask": json.dumps(header)}}
    for name, start, size in places(planes, n):
        dtype, shape = planes[name]
        offsets = [start, start + n * size]
        entries[name] = {"dtype": dtype, "shape": [n, *shape], "data_offsets": offsets}
    return json.dumps(entries).encode()


def move(f, start, to, count, step=2**24):
    """Move `count` bytes of a file from `start` back to `to`."""
    for i in range(0, count if start > to else 0, step):
        f.seek(start + i)
        chunk = f.read(min(step, count - i))
        f.seek(to + i)
        f.write(chunk)
