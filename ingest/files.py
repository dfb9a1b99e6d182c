"""Picture files in folders, lists, zips and tars: names and bytes. Nothing is extracted to disk.

open_...(path) -> (pictures, fetch, *notes): pictures is [(place, name)] of them, and fetch(records)
yields (record, load) for records with such a place, where load() -> bytes. notes are lines on files
that are no pictures, and on code pages.
"""

import bz2
import contextlib
import gzip
import lzma
import os
import posixpath
import re
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from common.door import reading, regular, shown
from common.train import UserError
from ingest import codepages

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
MOST_BYTES = 2**26  # a picture file larger than this is refused: 16 are held at a time
# what may lie beside pictures, and nobody misses: texts, and what tools keep there
TEXTS = ".txt .caption .tags .json .jsonl .csv .tsv .xml .yaml .yml .toml .md .html .htm .log .nfo"
BESIDE = {*TEXTS.split(), ".ini", ".db", ".npy", ".npz", ".py", ".sh"}
LINK = "links to no file"
LONGEST_CHAIN = 40  # of links to links, as in Linux
# folders of macOS, Synology, QNAP and Windows, with thumbnails or what was deleted
TOOLS = {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN"}


def nfc(text):
    """One spelling per name: macOS writes the same letters decomposed."""
    return unicodedata.normalize("NFC", text)


def is_hidden(name):
    """By a dot, or a tool's, as __MACOSX/._x.png and .thumbnails/x.png."""
    parts = set(name.split("/")) - {".", ".."}
    return any(part in TOOLS or part.startswith(".") for part in parts)


def suffix_of(name):
    return os.path.splitext(name)[1].lower()


def is_image(name):
    """By its suffix; a hidden one is none."""
    return suffix_of(name) in SUFFIXES and not is_hidden(name)


def left_out(names, kinds, pictures):
    """A line, or none, on files that may be pictures and are not read.

    names: of all files that are no pictures; kinds: {name: what it is} where its suffix does not tell;
    pictures: names of those that are read, for the folders in which there are none.
    """
    lost = {}
    for name in sorted(names):
        if not is_hidden(name) and suffix_of(name) not in BESIDE:
            kind = kinds.get(name) or suffix_of(name) or "without suffix"
            lost[name.removeprefix("./")] = kind
    if not lost:
        return []
    count = Counter(lost.values()).most_common()
    by_kind = ", ".join(f"{n} {kind}" for kind, n in count[:5]) + ", ..." * (len(count) > 5)
    line = f"{len(lost)} files left out: {by_kind}; the first: {next(iter(lost))}"
    folders = {posixpath.dirname(name.removeprefix("./")) for name in pictures}
    read = {"", *(folder for inner in folders for folder in folders_above(inner))}
    empty = sorted(set(map(posixpath.dirname, lost)) - read)
    if empty:
        line += f"; folders that lost everything: {len(empty)}, such as {', '.join(empty[:3])}"
    fix = "convert what should be read, such as to .png; a new name alone converts nothing"
    return [shown(f"{line}; {fix}")]


def folders_above(folder):
    """Yield a/b and a of a/b."""
    while folder.strip("/"):
        yield folder
        folder = posixpath.dirname(folder)


def refuse_large(size):
    if size > MOST_BYTES:
        raise ValueError(f"the file has more than {MOST_BYTES >> 20} MB")


# ---- folders -------------------------------------------------------------------------------------


def walk_all(folder, prefix="", above=()):
    """Yield (name, what it is if it is no file) of all below a folder, sorted.

    Links that lead back are not followed.
    """
    here = os.path.realpath(folder)
    for entry in sorted(os.scandir(folder), key=lambda e: e.name) if here not in above else ():
        name = prefix + entry.name
        if entry.is_symlink() and not os.path.exists(entry.path):  # to nowhere, or to itself
            yield name, LINK
        elif entry.is_dir():
            yield from walk_all(entry.path, f"{name}/", (*above, here))
        else:
            yield name, None if entry.is_file() else "pipes or devices"


def walk(folder):
    """Names of the images below a folder, sorted."""
    return (name for name, kind in walk_all(folder) if is_image(name) and not kind)


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
    kinds = dict(walk_all(root))
    names = [name for name, kind in kinds.items() if is_image(name) and not kind]
    others = kinds.keys() - set(names)
    return [(name, name) for name in names], files_below(root), *left_out(others, kinds, names)


def as_it_lies(name, root=""):
    """A name in a list as it is there: with slashes for the backslashes of Windows, accents as on a Mac."""
    slashed = name.replace("\\", "/")
    likely = name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))
    return next((x for x in likely if os.path.exists(os.path.join(root, x))), name)


def open_list(_):
    """Standard input, one path a line; the folders that all of them have in common say nothing."""
    lines = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    paths = [os.path.normpath(as_it_lies(line)) for line in lines]
    top = "."
    if paths and all(map(os.path.isabs, paths)):
        try:
            top = os.path.commonpath([os.path.dirname(p) for p in paths])
        except ValueError:  # on Windows
            raise UserError("-: these paths lie on several drives; give one drive's") from None
    named = sorted((p, Path(os.path.relpath(p, top)).as_posix()) for p in paths)
    pictures = [(p, name) for p, name in named if is_image(name)]
    others = [name for p, name in named if not is_image(name) and not os.path.isdir(p)]
    return pictures, fetch_files, *left_out(others, {}, [name for _, name in pictures])


# ---- archives ------------------------------------------------------------------------------------


def most_unpacked(path):
    """Bytes that an archive may hold: pictures are packed already, and hardly shrink in it."""
    return 2**27 + 100 * os.path.getsize(path)


def refuse_escape(archive, name):
    """../x, /x and C:\\x lead out of an archive, and who packs that is not to be trusted."""
    if ".." in re.split(r"[/\\]", name) or re.match(r"/|\\|[A-Za-z]:", name):
        raise UserError(f"{archive} holds the name {name!r}, which leads out of it; pack it anew")


def open_zip(path, code=None):
    """The members of a zip are read in place, by name. code: of names that tell no code page."""
    with reading(path, "zip archive", "pack it anew"):
        archive = zipfile.ZipFile(path)
        size = sum(info.file_size for info in archive.infolist() if is_image(info.filename))
        if size > most_unpacked(path):
            raise ValueError(f"it says that it holds {size} bytes, far more than it has")
    members = sorted(archive.infolist(), key=lambda info: info.filename)
    names, notes = codepages.names_of(members, code)
    names = [name.replace("\\", "/") for name in names]  # some tools on Windows write those
    for name in names:
        refuse_escape(path, name)
    images = [pair for pair in zip(members, names, strict=True) if is_image(pair[1])]
    others = [name for name in names if not is_image(name) and not name.endswith("/")]
    notes += left_out(others, {}, [name for _, name in images])

    def fetch(records):
        return ((r, partial(read_member, archive, r.place)) for r in records)

    return images, fetch, *notes


def read_member(archive, info):
    refuse_large(info.file_size)
    return archive.read(info)


def open_tar(path):
    """A tar is read through from its beginning for every split. Its links are what they lead to."""

    def fetch(records):
        wanted = {}
        for record in records:
            wanted.setdefault(record.place, []).append(record)
        for member, data in tar_members(path, wanted):
            if data is not None:
                for record in wanted.pop(member.name):
                    yield record, partial(bytes, data)

    names = []
    whole = {}  # {a file's path: its name in the tar, which may begin with ./}
    links = {}  # {a link's path: what it names}
    for member, _ in tar_members(path):
        key = posixpath.normpath(member.name)
        if member.isfile():
            whole[key] = member.name
        elif member.islnk():
            links[key] = posixpath.normpath(member.linkname)
        elif member.issym():  # counts from its own folder
            beside = posixpath.join(posixpath.dirname(key), member.linkname)
            links[key] = posixpath.normpath(beside)
        if not member.isdir():
            names.append(member.name)
    places = {name: whole.get(end_of(posixpath.normpath(name), links)) for name in names}
    pictures = [(places[name], name) for name in names if places[name] and is_image(name)]
    read = {name for pair in pictures for name in pair}  # what a link leads to is read, too
    others = [name for name in names if name not in read]
    kinds = {name: LINK for name in names if not places[name]}
    return pictures, fetch, *left_out(others, kinds, [name for _, name in pictures])


def end_of(name, links):
    """What a chain of links {name: name} leads to. One that is longer, as a circle, leads to a link."""
    for _ in range(LONGEST_CHAIN):
        name = links.get(name, name)
    return name


# ---- tars ----------------------------------------------------------------------------------------
# Their headers say how much follows, and nothing is read before that is checked.

MOST_HEADER = 2**20  # bytes of a long name, or of a set of PAX fields
# What tarfile and decompressors raise for a broken file, besides tarfile's own errors.
BROKEN_TAR = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError)
BROKEN_TAR += (RecursionError,)
UNPACK = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open}  # how such a file begins: what reads it
UNPACK |= {b"\xfd7zXZ": lzma.open, b"\x5d\0\0\x80": lzma.open}
if find_spec("compression"):  # from Python 3.14
    from compression import zstd

    UNPACK[b"\x28\xb5\x2f\xfd"] = zstd.open


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


@contextlib.contextmanager
def opened_tar(path):
    """A tar, packed or not, as a stream.

    What it is packed with gives some kilobytes at a time. tarfile's own streams unpack a piece of the
    file whole, and move all that is left of it at each step: 151 bytes can be a gigabyte.
    """
    with open(path, "rb") as file:
        start = file.read(6)
    unpack = next((how for magic, how in UNPACK.items() if start.startswith(magic)), open)
    with unpack(path, "rb") as file:
        pieces = SimpleNamespace(read=file.read1)
        with tarfile.open(fileobj=pieces, mode="r|", tarinfo=Member) as tar:
            yield tar


def is_tar(path):
    try:
        with opened_tar(path):
            return True
    except BROKEN_TAR:
        return False


def tar_members(path, wanted=()):
    """Yield (member, bytes of a file, or None if it is not wanted) of a tar, in its order."""
    most = most_unpacked(path)
    try:
        with opened_tar(path) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would remember every member
                refuse_escape(path, member.name)
                most -= 4096  # else a megabyte could hold a million members of nothing
                if member.offset_data + member.size > most:
                    claims = f"{member.name[:80]!r} says {member.size} bytes"
                    raise tarfile.ReadError(f"it unpacks to far more than its size; {claims}")
                # one too large can't be read, and is named
                size = member.size if member.size <= MOST_BYTES else 0
                asked = member.isfile() and member.name in wanted
                yield member, tar.extractfile(member).read(size) if asked else None
    except BROKEN_TAR as problem:
        raise UserError(f"{path} is not a whole tar archive: {problem}") from None
