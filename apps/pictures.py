"""What applications say of the pictures that they were given, and the pictures that they write."""

import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path

from PIL import Image

from common.door import shown
from common.locks import reserve
from common.train import UserError, atomic
from ingest.pack import DRAWN

LONGEST = 255 - len("-overlay.png")  # bytes of a picture's name: a file's has 255, with its ending
FORBIDDEN = re.compile(r'[<>:"/\\|?*]|[. ]+$')  # in names of files, on some system
DEVICES = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\..*)?$", re.IGNORECASE)  # on Windows
# {path without case and ending of files: their picture}, of all commands that a notebook runs
OWNERS = {}


def tell_problems(problems, trained_on, as_json=False):
    """Say on stderr what could not be read, and whether the network has seen a demo set alone."""
    for key, problem in problems:
        print(f"skipped: {shown(problem)}", file=sys.stderr)
        if as_json:
            print(json.dumps({"picture": key, "error": problem}, ensure_ascii=False))
    if note := demo_note(trained_on):
        print(f"note: {note}", file=sys.stderr)


def demo_note(trained_on):
    """A sentence for networks that were trained on a demo set alone, or None.

    trained_on: the folder of the data set that the file of the network names.
    """
    if Path(trained_on or "").name in DRAWN:
        return "trained on the demo set alone: of other pictures, answers are guesses"
    return None


def file_name(name):
    """A name as a file or folder can have it on every system."""
    name = FORBIDDEN.sub("_", name)
    name = re.sub(r"^\.", "_", name)  # what begins with a dot is hidden
    return f"_{name}" if DEVICES.match(name) else name  # CON.png_ would still be a device


def save_pngs(out, key, pictures, in_folders=False):
    """Write OUT/NAME{ending}.png of {ending: u8 (H, W, 3)} -> their paths below OUT, in order.

    NAME: folder and name of the picture key.
    in_folders: below OUT are the folders of the key, and NAME is its name; data.py takes such a
    folder for the character. Where another picture has it, NAME is the whole key.
    """
    out = Path(out)
    words = [part for part in Path(key).parts if part.strip("./")]
    words = [file_name(word) for word in words]
    folder = Path(*words[:-1]) if in_folders else Path()
    own = "-".join(words[-1:] if in_folders else words[-2:]).removesuffix(Path(key).suffix)
    whole = "-".join(words)
    for name in (own, whole, f"{whole}-{digest_of(key)}"):
        # x.jpg beside x.png, or X.PNG: for many a disk, x and X are one name
        place = str(Path(out, folder, name).absolute()).casefold()
        if OWNERS.setdefault(place, key) == key:
            break
    name = shortened(name, key)
    files = [folder / f"{name}{ending}.png" for ending in pictures]
    reserve([], out / ".lock")
    for file, pixels in zip(files, pictures.values(), strict=True):
        path = out / file
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        if path.is_file() and path.read_bytes() == png.getvalue():
            continue  # of a call that was killed, and is given again
        if os.path.lexists(path):  # perhaps the picture itself, so nobody is told to remove it
            raise UserError(
                f"{path} is there already, and is another picture; choose another --out"
            )
        with atomic(path) as temporary:
            temporary.write_bytes(png.getvalue())
    return files


def shortened(name, key):
    """The name, or where it is longer than LONGEST its beginning and a digest of the picture key."""
    letters = os.fsencode(name)
    if len(letters) <= LONGEST:
        return name
    return letters[: LONGEST - 9].decode("utf-8", "ignore") + f"-{digest_of(key)}"


def digest_of(key):
    return hashlib.blake2b(os.fsencode(key), digest_size=4).hexdigest()
