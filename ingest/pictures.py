"""Pictures that somebody names on a command line, one after the other, cut as a network was trained."""

import itertools
import sys
from pathlib import Path

from common.door import shown
from common.train import UserError
from ingest import files, sources
from ingest.decode import decode, decode_records, reason, whole


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
