"""In which code page the names of a zip are written, where it does not say so.

A zip holds bytes. A flag says that they are UTF-8, or a field repeats the name in UTF-8. Older
programs write neither, and mean the code page of their country. What is Japanese in cp932 can be read
in gbk and cp949, too, but as odd letters. So all names of an archive are read in each code page, and
the one in which they are the most ordinary is taken: the one of the fewest bits. If a code page has n
letters of a kind, and they are a share p of what people write, each of them has log2(n / p) bits.
"""

import struct
import zlib

from common.door import shown
from common.train import UserError

CODES = ("utf-8", "cp932", "gbk", "cp949", "cp437")
COMMON = {  # the first and the last letter of a kind, and their bits
    "cp932": ((0x829F, 0x8396, 8.4), (0x889F, 0x9872, 12.7)),  # kana; the first level of kanji
    "gbk": ((0xB0A1, 0xD7F9, 11.9),),  # the first level of hanzi
    "cp949": ((0xB0A1, 0xC8FE, 11.7),),  # hangul
}
# Half of the common hanzi have codes of hangul. Two short names are told apart by how syllables end:
# most have no final consonant, or one of these, by their number in Unicode.
USUAL = (1, 4, 8, 16, 17, 21)
OPEN, UNUSUAL = 9.3, 14.8
RARE = 18.6  # any other letter of these three
ASCII = 6.0
ACCENTED = 6.2  # such as é, beside a letter of ASCII; where none is, it is hardly a word
TWO_BYTES, THREE_BYTES = 12.0, 14.0  # of UTF-8
BROKEN = 20.0  # a byte of a name that can't be read in this code page
ENOUGH = 2000  # names are looked at; of three, hardly a guess was wrong


def bits_of(letter, code, around):
    """around: the letter with those before and after it."""
    if letter.isascii():
        return ASCII
    raw = letter.encode(code)
    if code == "cp437" or (code == "utf-8" and len(raw) == 2):
        beside = any(x.isascii() and x.isalpha() for x in around)
        return ACCENTED if beside and letter.isalpha() and letter < "\u0250" else TWO_BYTES
    if code == "utf-8":
        return THREE_BYTES
    number = int.from_bytes(raw, "big")
    fitting = [bits for first, last, bits in COMMON[code] if first <= number <= last]
    # Both bytes of a common letter are A1 or more in gbk and cp949; rare ones were added between them.
    if not fitting or (code != "cp932" and raw[1] < 0xA1):
        return RARE
    end = (ord(letter) - 0xAC00) % 28  # Unicode numbers hangul by their three sounds
    if code == "cp949" and end not in USUAL:
        return UNUSUAL if end else OPEN
    return fitting[0]


def bits_of_name(name, code):
    try:
        text = name.decode(code)
    except UnicodeDecodeError:
        return BROKEN * len(name)
    return sum(bits_of(x, code, text[max(0, i - 1) : i + 2]) for i, x in enumerate(text))


def ranked(names):
    """The code pages, first the one in which names, bytes, are the most ordinary."""
    parts = sorted({part for name in names for part in name.split(b"/") if not part.isascii()})
    some = parts[:: 1 + len(parts) // ENOUGH]  # a folder once
    return sorted(CODES, key=lambda code: sum(bits_of_name(part, code) for part in some))


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
    odd = []
    for i in silent:
        try:
            names[i] = raw[i].decode(used)
        except UnicodeDecodeError:
            names[i] = raw[i].decode("cp437")
            odd.append(names[i])
    if code and odd:
        raise UserError(f"--names {code}: {shown(odd[0])} is no name in it; give another code page")
    first = silent[0]
    line = f"{len(silent)} names tell no code page, and are read as {used}, such as {names[first]}"
    if odd:
        line += f"; {len(odd)} do not fit, such as {odd[0]}"
    if second:
        line += f"; data.py --names {second} would read {raw[first].decode(second, 'replace')}"
    return names, [shown(line)]
