"""Picture files in folders, lists, zips and tars: names and bytes. Nothing is extracted to disk.

open_...(path) -> (pictures, fetch, *notes): pictures is [(place, name)] of them, and fetch(records)
yields (record, load) for records with such a place, where load() -> bytes. notes are lines on files
that are no pictures, and on code pages.
"""

import contextlib
import os
import posixpath
import re
import sys
import tarfile
import unicodedata
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

from common.door import reading, regular, shown
from common.train import UserError
from ingest import codepages
from ingest.layouts import counted

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
MOST_BYTES = 2**26  # a picture file larger than this is refused: 16 are held at a time
# what may lie beside pictures, and nobody misses: texts, and what tools keep there
TEXTS = ".txt .caption .tags .json .jsonl .csv .tsv .xml .yaml .yml .toml .md .html .htm .log .nfo"
BESIDE = {*TEXTS.split(), ".ini", ".db", ".npy", ".npz", ".py", ".sh"}
ROOM = 2**27  # bytes that even a tiny archive may hold
LINK = "links to no file"
LONGEST_CHAIN = 40  # of links to links, as in Linux
# folders of macOS, Synology, QNAP and Windows, with thumbnails or what was deleted
TOOLS = {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN"}
# and what programs call by a dot; another name with a dot is somebody's, such as .hack or ...1.png
WORDS = "git(hub)?|svn|hg|idea|vs(code)?|v?env|dvc|nox|tox|te?mp|sync|stfolder|stversions|wdmc"
INSIDE = "thumb(?!e)|trash|cache|recycle|checkpoint|snapshot|spotlight|fsevent|appled|pending-|"
INSIDE += r"picasa|xvpics|dropbox|temporaryitems|documentrevisions|\.(te?mp|lock|sw[op])\b"
OF_A_TOOL = re.compile(rf"\.([_@~#]|({WORDS})(?![a-z])|.*({INSIDE})).*", re.IGNORECASE)
DOT = re.compile(r"(^|/)\.(?!\.?/)")  # before a file or a folder, not of ./ and ../


def nfc(text):
    """One spelling per name: macOS writes the same letters decomposed."""
    return unicodedata.normalize("NFC", text)


def is_of_a_tool(name):
    """As __MACOSX/._x.png and .thumbnails/x.png."""
    return any(part in TOOLS or OF_A_TOOL.fullmatch(part) for part in name.split("/"))


def suffix_of(name):
    return os.path.splitext(name)[1].lower()


def is_image(name):
    """By its suffix, which may be all of its name, as .png; a tool's is none."""
    return suffix_of(f"x{posixpath.basename(name)}") in SUFFIXES and not is_of_a_tool(name)


def notes_on(pictures, others, kinds=None):
    """Lines on pictures that most programs hide, and on files that may be pictures and are not read.

    pictures, such as .flow/1.png and ...1.png, and others: names of all files. kinds: {name: what it
    is} where its suffix does not tell.
    """
    hidden = [name.removeprefix("./") for name in pictures if DOT.search(name)]
    what = "pictures are read, though their names or folders begin with a dot"
    fix = "move those that a program keeps there out of this folder"
    notes = counted(hidden, what, fix)
    settings = {x for x in others if posixpath.basename(x)[:1] == "." and not suffix_of(x)}
    lost = {x for x in others if not is_of_a_tool(x) and suffix_of(x) not in BESIDE}
    lost = sorted(lost - settings)
    if lost:
        kinds = [(kinds or {}).get(x) or suffix_of(x) or "without suffix" for x in lost]
        by_kind = ", ".join(f"{n} {kind}" for kind, n in Counter(kinds).most_common(5))
        line = f"{len(lost)} files left out: {by_kind}; the first: {lost[0].removeprefix('./')}"
        fix = "convert what should be read, such as to .png; a new name alone converts nothing"
        notes.append(shown(f"{line}; {fix}"))
    return notes


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


def walk(folder, suffixes=SUFFIXES):
    """Names of the files below a folder with these suffixes, sorted, without hidden ones.

    No label file has a hidden one's name, and none names such a picture.
    """
    for name, kind in walk_all(folder):
        is_hidden = DOT.search(name) or is_of_a_tool(name)
        if suffix_of(name) in suffixes and not kind and not is_hidden:
            yield name


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
    notes = notes_on(names, kinds.keys() - set(names), kinds)
    return [(name, name) for name in names], files_below(root), *notes


def as_it_lies(name, root=""):
    """A name in a list as it is there: with slashes for the backslashes of Windows, accents as on a Mac."""
    slashed = name.replace("\\", "/")
    likely = name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))
    return next((x for x in likely if os.path.exists(os.path.join(root, x))), name)


def open_list(_):
    """Standard input, one path a line; the folders that all of them have in common say nothing."""
    lines = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    paths = [os.path.normpath(as_it_lies(line)) for line in lines]
    absolute = bool(paths) and all(map(os.path.isabs, paths))
    top = os.path.commonpath([os.path.dirname(p) for p in paths]) if absolute else "."
    named = sorted((p, Path(os.path.relpath(p, top)).as_posix()) for p in paths)
    shared = len(os.path.commonprefix([name.split("/")[:-1] for _, name in named]))
    own = {name: "/".join(name.split("/")[shared:]) for _, name in named}
    pictures = [(p, name) for p, name in named if is_image(own[name])]
    others = [own[x] for p, x in named if not is_image(own[x]) and not os.path.isdir(p)]
    return pictures, fetch_files, *notes_on([own[name] for _, name in pictures], others)


# ---- archives ------------------------------------------------------------------------------------


def refuse_bomb(path, size):
    """Pictures are packed already, and hardly shrink in an archive: one of zeros fills the memory."""
    own = os.path.getsize(path)
    most = ROOM + 100 * own
    if size > most:
        problem = f"{path} has {own} bytes, and unpacks to more than {most >> 20} MB"
        raise UserError(f"{problem}; unpack it yourself, and give the folder")


def refuse_escape(archive, name):
    """../x, /x and C:\\x lead out of an archive, and who packs that is not to be trusted."""
    if ".." in re.split(r"[/\\]", name) or re.match(r"/|\\|[A-Za-z]:", name):
        raise UserError(f"{archive} holds the name {name!r}, which leads out of it; pack it anew")


def open_zip(path, code=None):
    """The members of a zip are read in place, by name. code: of names that tell no code page."""
    with reading(path, "zip archive", "pack it anew"):
        archive = zipfile.ZipFile(path)
    refuse_bomb(path, sum(x.file_size for x in archive.infolist() if is_image(x.filename)))
    members = sorted(archive.infolist(), key=lambda info: info.filename)
    names, notes = codepages.names_of(members, code)
    names = [name.replace("\\", "/") for name in names]  # some tools on Windows write those
    for name in names:
        refuse_escape(path, name)
    images = [pair for pair in zip(members, names, strict=True) if is_image(pair[1])]
    others = [name for name in names if not is_image(name) and not name.endswith("/")]
    notes += notes_on([name for _, name in images], others)

    def fetch(records):
        return ((r, partial(read_member, archive, r.place)) for r in records)

    return images, fetch, *notes


def read_member(archive, info):
    refuse_large(info.file_size)
    return archive.read(info)


def is_tar(path):
    with contextlib.suppress(Exception):  # a broken one may raise what its packer raises
        return tarfile.is_tarfile(path)
    return False


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
        if member.isdir():
            continue
        key = posixpath.normpath(member.name)
        names.append(member.name)
        if member.isfile():
            whole[key] = member.name
        else:  # what a symbolic link names counts from its own folder
            above = posixpath.dirname(key) if member.issym() else ""
            links[key] = posixpath.normpath(posixpath.join(above, member.linkname))
    places = {name: whole.get(end_of(posixpath.normpath(name), links)) for name in names}
    pictures = [(places[name], name) for name in names if places[name] and is_image(name)]
    read = {name for pair in pictures for name in pair}  # what a link leads to is read, too
    kinds = {name: LINK for name in names if not places[name]}
    others = [name for name in names if name not in read]
    return pictures, fetch, *notes_on([name for _, name in pictures], others, kinds)


def end_of(name, links):
    """What a chain of links {name: name} leads to. One that is longer, as a circle, leads to a link."""
    for _ in range(LONGEST_CHAIN):
        name = links.get(name, name)
    return name


def tar_members(path, wanted=()):
    """Yield (member, bytes of a file, or None if it is not wanted) of a tar, in its order."""
    with reading(path, "tar archive", "pack it anew"), tarfile.open(path) as tar:
        for member in iter(tar.next, None):
            tar.members.clear()  # it would remember every member
            refuse_escape(path, member.name)
            refuse_bomb(path, member.offset_data + member.size)
            asked = member.isfile() and member.name in wanted
            # one too large can't be read, and is named
            size = member.size if member.size <= MOST_BYTES else 0
            yield member, tar.extractfile(member).read(size) if asked else None
