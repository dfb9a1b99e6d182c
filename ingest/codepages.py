"""In which code page the names of a zip are written, where it does not say so.

A zip holds bytes. A flag says that they are UTF-8, or a field repeats the name in UTF-8. Older
programs write neither, and mean the code page of their country. What is Japanese in cp932 can be read
in gbk and cp949, too, but as odd letters. So all names of an archive are read in each code page, and
charset-normalizer says how odd they look.
"""

import struct
import zlib

from common.door import shown
from common.train import UserError

# The standard of a country has its common letters. The code page adds so many rare ones that it makes
# letters of almost any bytes, so it counts only where the standard does not fit. Of two that look
# alike the first is taken.
STANDARDS = {"utf-8": "utf-8", "cp437": "cp437", "cp949": "euc_kr", "gbk": "gb2312"}
STANDARDS |= {"cp932": "cp932"}
FITTING = 0.9  # of the names: a truncated one does not decide for all
RARE, BROKEN = 0.5, 1.0  # oddness of what only the code page has, and of what it has not
ENOUGH = 2000  # names are looked at; of three, no guess was wrong
LONG = 1000  # bytes: of a shorter text charset-normalizer can't tell, so it comes again and again


def oddness(names, code):
    """How odd the names, bytes, look in an encoding: 0 to 1."""
    from charset_normalizer import from_bytes

    fitting = [name for name in names if fits(name, code)]
    if len(fitting) < FITTING * len(names):
        return BROKEN
    if code == "utf-8":  # hardly anything else can be read as that
        return 0.0
    text = b"\n".join(fitting)
    text = b"\n".join([text] * (1 + LONG // len(text)))
    best = from_bytes(text, cp_isolation=[code], threshold=BROKEN).best()
    return best.chaos if best else BROKEN


def fits(name, code):
    try:
        return bool(name.decode(code))
    except UnicodeDecodeError:
        return False


def ranked(names):
    """The code pages, first the one in which names, bytes, look the least odd."""
    parts = sorted({part for name in names for part in name.split(b"/") if not part.isascii()})
    some = parts[:: 1 + len(parts) // ENOUGH]
    odd = {
        code: min(oddness(some, standard), RARE + oddness(some, code))
        for code, standard in STANDARDS.items()
    }
    return sorted(odd, key=odd.get)


def told_name(member):
    """The name of a member of a zip, where the zip tells its code page; else None."""
    if member.flag_bits & 0x800 or member.orig_filename.isascii():
        return member.filename
    raw = member.orig_filename.encode("cp437")  # as zipfile decoded it
    extra = member.extra
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        # Info-ZIP's Unicode Path: a version, the checksum of the name that it repeats, and UTF-8
        if kind == 0x7075 and field[:5] == struct.pack("<BI", 1, zlib.crc32(raw)):
            return field[5:].decode("utf-8", "replace")
    return None


def names_of(members, code=None):
    """Members of a zip -> their names, and a line where a code page was guessed or given.

    code: the code page of names that do not tell theirs; None: it is guessed, once for all of them.
    """
    names = [told_name(member) for member in members]
    silent = [i for i, name in enumerate(names) if name is None]
    if not silent:
        return names, []
    raw = {i: members[i].orig_filename.encode("cp437") for i in silent}
    used, second = (code, None) if code else ranked(raw.values())[:2]
    for i in silent:
        names[i] = raw[i].decode(used if fits(raw[i], used) else "cp437")
    odd = [names[i] for i in silent if not fits(raw[i], used)]
    if code and odd:
        raise UserError(f"--names {code}: {shown(odd[0])} is no name in it; give another code page")
    first = silent[0]
    line = f"{len(silent)} names tell no code page, and are read as {used}, such as {names[first]}"
    if odd:
        line += f"; {len(odd)} do not fit, such as {odd[0]}"
    if second and fits(raw[first], second):
        line += f"; data.py --names {second} would read {raw[first].decode(second, 'replace')}"
    return names, [shown(line)]
