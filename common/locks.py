"""Locks: what several processes might write at once is written by one of them at a time.

A lock is an empty file that the system ties to the process that holds it. It ends with the process,
so a killed one locks nothing. Galleries, data sets and the folders of studies have one.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from filelock import FileLock, Timeout

from common.train import AT_END, UserError, refuse_overwrite

HELD = set()  # paths of the locks that this command holds until it ends


def reserve(paths, lock=None, fix="choose another --out"):
    """What a command writes is its own until it ends: others are refused, and so is what is there.

    lock: the lock file, `.lock` in a folder that is the command's own; default: beside the first path.
    """
    lock = Path(lock or lock_beside(paths[0])).absolute()
    if lock not in HELD:
        AT_END.enter_context(locked(lock))
        AT_END.callback(HELD.discard, lock)
        HELD.add(lock)
    refuse_overwrite(paths, fix)


def lock_beside(path):
    """The lock file of a file, or of a folder that is not there yet."""
    path = Path(os.path.abspath(path))  # "." has a name, too
    name = path.name
    if len(os.fsencode(name)) > 240:  # a name has at most 255 bytes
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.parent / f".{name}.lock"


@contextlib.contextmanager
def locked(path, wait=False):
    """Hold a lock file. Where another process holds it: a UserError, or wait."""
    path = Path(path)
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as problem:
        name = problem.filename
        raise UserError(f"{name} is a file, or lies under one; give another folder") from None
    # mode: in a folder that people share, one may take over what another's killed process has left.
    lock = FileLock(path, timeout=-1 if wait else 0, mode=0o666)
    try:
        lock.acquire()
    except Timeout:
        who = f"another process ({path.name})"
        fix = "wait, or write elsewhere"
        raise UserError(f"{path.parent} is being written by {who}; {fix}") from None
    except OSError:
        pass  # a file system without locks locks nothing
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            path.unlink()  # before it is let go: who waits for this file looks again
        lock.release()
        with contextlib.suppress(OSError):  # one holds something by now
            for folder in made:
                folder.rmdir()
