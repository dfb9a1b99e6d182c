"""Picture files in folders, lists, zips and tars: names and bytes. Nothing is extracted to disk.

open_...(path) -> (found, fetch): found is [(place, name)] of the pictures, and fetch(records)
yields (record, load) for records with such a place, where load() -> bytes.
"""

import os
import re
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from functools import partial
from pathlib import Path

from common.io import UserError, reading, regular

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
MOST_BYTES = 2**26  # a picture file larger than this is refused: 16 are held at a time
# folders of macOS, Synology, QNAP and Windows, with thumbnails or what was deleted
TOOLS = {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN"}


def nfc(text):
    """One spelling per name: macOS writes the same letters decomposed."""
    return unicodedata.normalize("NFC", text)


def is_image(name):
    """By its suffix; a tool's or hidden one, as __MACOSX/._x.png and .thumbnails/x.png, is none."""
    parts = set(name.split("/")) - {".", ".."}
    hidden = any(part in TOOLS or part.startswith(".") for part in parts)
    return os.path.splitext(name)[1].lower() in SUFFIXES and not hidden


def refuse_large(size):
    if size > MOST_BYTES:
        raise ValueError(f"the file has more than {MOST_BYTES >> 20} MB")


# ---- folders -------------------------------------------------------------------------------------


def walk(folder, prefix="", above=()):
    """Names of the images below a folder, sorted. Links that lead back are not followed."""
    here = os.path.realpath(folder)
    for entry in sorted(os.scandir(folder), key=lambda e: e.name) if here not in above else ():
        if entry.is_symlink() and not os.path.exists(entry.path):  # to nowhere, or to itself
            continue
        if entry.is_dir():
            yield from walk(entry.path, f"{prefix}{entry.name}/", (*above, here))
        elif is_image(prefix + entry.name) and entry.is_file():
            yield prefix + entry.name


def read_whole(path):
    refuse_large(os.path.getsize(regular(path)))
    with open(path, "rb") as f:
        return f.read()


def fetch_files(records, root=""):
    """For records whose place is the path of a file, relative to root or absolute."""
    return ((r, partial(read_whole, os.path.join(root, r.place))) for r in records)


def files_below(root):
    """-> fetch for records whose place is the path of a file below a folder."""
    if not Path(root).is_dir():
        raise UserError(f"{root} is not there: unpack the pictures of the data set into it")
    return partial(fetch_files, root=root)


def open_folder(root):
    return [(name, name) for name in walk(root)], files_below(root)


def open_list(_):
    """Standard input, one path a line; the folders that all of them have in common say nothing."""
    paths = [os.path.normpath(line.rstrip("\r\n")) for line in sys.stdin if line.strip()]
    top = "."
    if paths and all(map(os.path.isabs, paths)):
        top = os.path.commonpath([os.path.dirname(p) for p in paths])
    named = sorted((p, Path(os.path.relpath(p, top)).as_posix()) for p in paths)
    return [(p, name) for p, name in named if is_image(name)], fetch_files


# ---- archives ------------------------------------------------------------------------------------


def refuse_escape(archive, name):
    """../x, /x and C:\\x lead out of an archive, and who packs that is not to be trusted."""
    if ".." in re.split(r"[/\\]", name) or re.match(r"/|\\|[A-Za-z]:", name):
        raise UserError(f"{archive} holds the name {name!r}, which leads out of it; pack it anew")


def open_zip(path):
    """The members of a zip are read in place, by name."""
    with reading(path, "zip archive", "pack it anew"):
        archive = zipfile.ZipFile(path)
    for name in archive.namelist():
        refuse_escape(path, name)
    members = sorted(archive.infolist(), key=lambda info: info.filename)
    images = [(info, zip_name(info)) for info in members if is_image(zip_name(info))]

    def fetch(records):
        return ((r, partial(read_member, archive, r.place)) for r in records)

    return images, fetch


def zip_name(info):
    """Names without the UTF-8 flag are mostly UTF-8 (macOS) or Japanese, not cp437."""
    name = info.filename
    if not info.flag_bits & 0x800 and not name.isascii():
        for code in ("utf-8", "cp932"):
            try:
                name = info.filename.encode("cp437").decode(code)
                break
            except UnicodeError:
                continue
    return name.replace("\\", "/")  # some tools on Windows write those between folders


def read_member(archive, info):
    refuse_large(info.file_size)
    return archive.read(info)


def open_tar(path):
    """A tar is read through from its beginning for every split."""

    def fetch(records):
        wanted = {r.place: r for r in records}
        for name, data in tar_images(path, wanted):
            if data is not None:
                yield wanted.pop(name), partial(bytes, data)

    return [(name, name) for name, _ in tar_images(path)], fetch


# ---- tars ----------------------------------------------------------------------------------------
# Their headers say how much follows, and nothing is read before that is checked.

MOST_HEADER = 2**20  # bytes of a long name, or of a set of PAX fields
# What tarfile raises for a broken header, besides its own errors.
BROKEN_TAR = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, RecursionError)


def refuse_sparse(*_):
    raise tarfile.ReadError("it holds a sparse file; pack it without --sparse")


class Member(tarfile.TarInfo):
    """A header of a tar. Long headers and sparse files are refused before they are read."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.GNUTYPE_SPARSE:
            refuse_sparse()
        if not member.isreg() and not 0 <= member.size <= MOST_HEADER:
            raise tarfile.ReadError(f"it has a header of {member.size} bytes")
        return member

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = refuse_sparse


def is_tar(path):
    try:
        with tarfile.open(path, "r|*", tarinfo=Member):
            return True
    except BROKEN_TAR:
        return False


def tar_images(path, wanted=()):
    """Yield (name, bytes, or None if it is not wanted) of the pictures of a tar, in its order."""
    most = 2**30 + 1000 * os.path.getsize(path)  # pictures hardly shrink when they are packed
    try:
        with tarfile.open(path, "r|*", tarinfo=Member) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would remember every member
                refuse_escape(path, member.name)
                if member.offset_data + member.size > most:
                    raise tarfile.ReadError(f"{member.name[:80]!r} says {member.size} bytes")
                if member.isfile() and is_image(member.name):
                    # one too large can't be read, and is named
                    size = member.size if member.size <= MOST_BYTES else 0
                    asked = member.name in wanted
                    yield member.name, tar.extractfile(member).read(size) if asked else None
    except BROKEN_TAR as problem:
        raise UserError(f"{path} is not a whole tar archive: {problem}") from None
