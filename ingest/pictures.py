"""Pictures that somebody names on a command line, one after the other, cut as a network was trained."""

import hashlib
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path

from PIL import Image

from common.door import shown
from common.locks import reserve
from common.train import UserError, atomic
from ingest import files, sources
from ingest.decode import decode, decode_records, reason, whole
from ingest.pack import DRAWN

LONGEST = 255 - len("-overlay.png")  # bytes of a picture's name: a file's has 255, with its ending
FORBIDDEN = re.compile(r'[<>:"/\\|?*]|[. ]+$')  # in names of files, on some system
DEVICES = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\..*)?$", re.IGNORECASE)  # on Windows
OWNERS = {}  # {(folder, name) of files that this command writes: the picture that they are of}


def pictures(paths, size, crop, margin, problems):
    """Files, folders, archives, - for a list -> yield (key, u8 (size, size, 3)), cut by `crop`.

    What can't be read is noted in problems, as (key, why).
    """

    def work(record, data):
        return decode(data, size, False, record.box, crop, margin)["images"]

    return each_picture(paths, work, problems)


def whole_pictures(paths, problems):
    """The same, uncut: yield (key, u8 (H, W, 3)). A very large one is reduced, which is told."""
    for key, (picture, scale) in each_picture(paths, lambda r, b: whole(b), problems, at_once=1):
        if scale < 1:
            size = f"{picture.shape[1]} x {picture.shape[0]} pixels"
            note = f"{shown(key)} is large: it is reduced to {size}, and results count those"
            print(f"note: {note}", file=sys.stderr)
        yield key, picture


def each_picture(paths, work, problems, at_once=16):
    """Yield (key, work(record, bytes)) of all that can be read, `at_once` of them ahead.

    Where nothing can be read, it is an error.
    """
    count = 0
    # Pictures that are named one by one are one source: threads decode them side by side.
    for path, some in itertools.groupby(paths, lambda x: x if is_source(x) else None):
        try:
            records, fetch, notes = found_at(path, some)
            for note in notes:
                print(f"note: {path}: {shown(note)}", file=sys.stderr)
            # files of two folders may have one name; a list on standard input holds paths
            below = len(paths) > 1 and path not in (None, "-")
            for record, row in decode_records(records, fetch, work, at_once):
                key = str(Path(path, record.key)) if below else record.key
                if isinstance(row, Exception):
                    why = f"{key} is not a picture that can be read: {reason(row)}"
                    problems.append((key, why))
                else:
                    count += 1
                    yield key, row
        except UserError as problem:  # a hostile or broken archive, a path that is not there
            if path is None:  # memory is full: the others have not been looked at
                raise
            problems.append((path, str(problem)))
    if not count:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise UserError(problems[0][1] + more if problems else "no picture was given")


def is_source(path):
    return path == "-" or not is_picture(Path(path))


def found_at(path, some):
    """-> records and fetch of a path on the command line, and lines on what was left out of it.

    path None: of `some` pictures.
    """
    if path is None:
        return [sources.Record(x, str(Path(x).resolve())) for x in some], files.fetch_files, []
    records, fetch, notes = sources.find(path, layout=())
    return records, fetch, notes[1:]  # the first says that folders are not read


def is_picture(path):
    """A file that is no archive and no list is taken for a picture, whatever its name."""
    try:
        return path.is_file() and (files.is_image(path.name) or not sources.reader_of(path))
    except UserError:
        return True


def picture_files(path):
    """-> {key: the file} of the pictures at a path, a picture or a folder; keys as above, of one path."""
    folder = Path(path)
    if folder.is_dir():
        pairs, _, *notes = files.open_folder(folder)
        for note in notes:
            print(f"note: {path}: {note}", file=sys.stderr)
        file_of = {}
        names = [name for name, _ in pairs]
        for name in sorted(names, key=lambda name: sources.nfc(name) != name):
            key = sources.nfc(name)
            file_of[name if key in file_of else key] = folder / name
        return file_of
    if str(path) != "-" and not folder.exists():
        raise UserError(f"{path} does not exist")
    if str(path) == "-" or not is_picture(folder):
        raise UserError(f"{path} is no picture and no folder; unpack it, files go beside pictures")
    return {str(path): folder}


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
    """Write OUT/NAME{ending}.png of {ending: u8 (H, W, 3)}; NAME: folder and name of the picture key.

    in_folders: below OUT are the folders of the key, and NAME is its name; data.py takes such a
    folder for the character. Where another picture has it, NAME is the whole key.
    """
    out = Path(out)
    words = [part for part in Path(key).parts if part.strip("./")]
    words = [file_name(word) for word in words]
    folder = Path(*words[:-1]) if in_folders else Path()
    name = "-".join(words[-1:] if in_folders else words[-2:]).removesuffix(Path(key).suffix)
    if OWNERS.setdefault((folder, name), key) != key:
        name = "-".join(words)  # x.jpg beside x.png
    name = shortened(name, key)
    for ending, pixels in pictures.items():
        path = out / folder / f"{name}{ending}.png"
        reserve([], out / ".lock")
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


def shortened(name, key):
    """The name, or where it is longer than LONGEST its beginning and a digest of the picture key."""
    letters = os.fsencode(name)
    if len(letters) <= LONGEST:
        return name
    digest = hashlib.blake2b(os.fsencode(key), digest_size=4).hexdigest()
    return letters[: LONGEST - 9].decode("utf-8", "ignore") + f"-{digest}"
