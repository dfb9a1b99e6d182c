"""In which code page the names of a zip are written, where it does not say so.

A zip holds bytes. A flag says that they are UTF-8, or a field repeats the name in UTF-8. Older
programs write neither, and mean the code page of their country. What is Japanese in cp932 can be read
in gbk and cp949, too, but as odd letters. So all names of an archive are read in each code page, and
the one in which they are the most ordinary is taken: the one of the fewest bits. If a code page has n
letters of a kind, and they are a share p of what people write, each of them has log2(n / p) bits.
"""

import struct
import zlib

from common.fields import shown
from common.io import UserError

CODES = ("utf-8", "cp932", "gbk", "cp949", "cp437")
ORDINARY = {  # bits of a letter; the first and the last of its kind
    "cp932": ((8.4, 0x829F, 0x8396), (12.7, 0x889F, 0x9872)),  # kana; the 2,965 common kanji
    "gbk": ((11.9, 0xB0A1, 0xD7F9),),  # the 3,755 common hanzi
}
# The 2,350 common hangul, without a final consonant, with one of the usual ones, and others. Half of
# the hanzi have codes of hangul, and these syllables alone tell two short names apart.
HANGUL = (9.3, 11.7, 14.8)
FINALS = (1, 4, 8, 16, 17, 21)
ASCII = 6.0
ACCENTED = 6.2  # such as é, beside a letter of ASCII; where none is, it is hardly a word
TWO_BYTES, THREE_BYTES = 12.0, 14.0  # of UTF-8
ODD = 18.6  # all other letters
BROKEN = 20.0  # a byte of a name that is none in this code page


def bits(name, code):
    """Of a name, bytes, in a code page."""
    try:
        text = name.decode(code)
    except UnicodeDecodeError:
        return BROKEN * len(name)
    return sum(bits_of(x, code, text[max(0, i - 1) : i + 2]) for i, x in enumerate(text))


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
    if code == "cp949":
        final = (ord(letter) - 0xAC00) % 28  # Unicode counts hangul by their three sounds
        common = b"\xb0\xa1" <= raw <= b"\xc8\xfe" and raw[1] >= 0xA1
        return HANGUL[(final > 0) + (final > 0 and final not in FINALS)] if common else ODD
    number = int.from_bytes(raw, "big")
    fitting = [one for one, first, last in ORDINARY[code] if first <= number <= last]
    if code == "gbk" and raw[-1] < 0xA1:  # rare ones stand between the rows of common ones
        return ODD
    return fitting[0] if fitting else ODD


def guess(names):
    """The code page in which names, bytes, are the most ordinary. A folder's counts once."""
    parts = {part for name in names for part in name.split(b"/") if not part.isascii()}
    return min(CODES, key=lambda code: sum(bits(part, code) for part in parts))


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
    used = code or guess(raw.values())
    odd = []
    for i in silent:
        try:
            names[i] = raw[i].decode(used)
        except UnicodeDecodeError:
            names[i] = raw[i].decode("cp437")
            odd.append(names[i])
    if code and odd:
        raise UserError(
            f"--names {code}: {odd[0]!r} is no name in this code page; give another one"
        )
    line = (
        f"{len(silent)} names tell no code page, and are read as {used}, such as {names[silent[0]]}"
    )
    line += "" if code else "; --names CODEPAGE overrules it"
    line += f"; {len(odd)} do not fit, such as {odd[0]}" if odd else ""
    return names, [shown(line)]
