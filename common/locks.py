"""Locks: what several processes might write at once is written by one of them at a time.

A lock is an empty file that the system ties to the process that holds it. It ends with the process,
so a killed one locks nothing. Galleries, data sets, studies and the folders of runs have one.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from common.train import AT_END, UserError, refuse_overwrite

try:
    import fcntl
except ImportError:  # there is none on Windows, and so no lock
    fcntl = None

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
    """Hold a lock file -> its descriptor. Where another process holds it: a UserError, or wait.

    The system ends a lock with its process: the file of a killed process locks nothing.
    """
    path = Path(path)
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as problem:
        name = problem.filename
        raise UserError(f"{name} is a file, or lies under one; give another folder") from None
    file = fcntl and open_locked(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield file
    finally:
        if fcntl:
            path.unlink(missing_ok=True)  # before it is let go: who waits for this file looks again
            os.close(file)
        with contextlib.suppress(OSError):  # one holds something by now
            for folder in made:
                folder.rmdir()


def open_locked(path, how):
    """-> the descriptor of a lock file that is locked, and still has a name."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            os.close(file)
            who = f"another process ({path.name})"
            fix = "wait, or write elsewhere"
            raise UserError(f"{path.parent} is being written by {who}; {fix}") from None
        except OSError:  # a file system without locks locks nothing
            return file
        if os.fstat(file).st_nlink:  # else the one that held it has just removed it
            return file
        os.close(file)
