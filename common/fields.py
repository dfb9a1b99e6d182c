"""What may stand in a file of somebody else: tables of fields, and the functions that check by them.

A table of a header is {name: Field}, and a table inside it is a header inside the header. A table
of arrays is {name: "dtype n D"}: the kind of number, then a letter or a number for each dimension.
A name that ends in "?" may be missing; in a header it may also be null.
"""

import math
import unicodedata
from collections import namedtuple

from common.io import UserError

Field = namedtuple("Field", "says fits")  # in words; a function of the value -> bool
LETTERS = 100  # of a name
LARGEST = 1e6  # absolute value of a weight: a network of larger ones overflows


# ---- names ---------------------------------------------------------------------------------------


def is_printable(letter):
    """A letter, sign or space; no line break, no control character, no half of a character."""
    return letter.isprintable() or unicodedata.category(letter) == "Zs"


def is_name(value):
    return isinstance(value, str) and 0 < len(value) <= LETTERS and all(map(is_printable, value))


def shown(text):
    """Text of somebody else for a terminal: what is not printable as an escape, such as \\x1b."""
    return "".join(
        c if is_printable(c) else c.encode("unicode_escape").decode("ascii") for c in text
    )


def short(value):
    """A value for a message: its first letters."""
    text = shown(repr(value) if isinstance(value, str | int | float | None) else str(type(value)))
    return text if len(text) <= LETTERS else text[:LETTERS] + "..."


def refuse_odd_name(name, what, fix):
    """A name that is about to be stored has to be one."""
    if not is_name(name):
        raise UserError(f"{what} {short(name)} has to be {NAME.says}; {fix}")


# ---- kinds of fields -----------------------------------------------------------------------------


def whole(low, high=10**9):
    return Field(
        f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high
    )


def number(low=-LARGEST, high=LARGEST):
    return Field(
        f"a number from {low:g} to {high:g}",
        lambda v: type(v) in (int, float) and low <= v <= high,
    )


def one_of(*values):
    return Field(
        "one of " + ", ".join(map(str, values)), lambda v: isinstance(v, str) and v in values
    )


def list_of(field, least=0, most=10**8):
    """most: the same as least where the length is fixed."""
    return Field(
        f"a list of {least} or more, each {field.says}",
        lambda v: isinstance(v, list) and least <= len(v) <= most and all(map(field.fits, v)),
    )


def table_of(field):
    return Field(
        f"a table, each {field.says}",
        lambda v: isinstance(v, dict) and all(map(field.fits, v.values())),
    )


ANYTHING = Field("anything", lambda v: True)
FLAG = Field("true or false", lambda v: isinstance(v, bool))
TEXT = Field("a text of at most 4,096 letters", lambda v: isinstance(v, str) and len(v) <= 4096)
NAME = Field(f"one line of 1 to {LETTERS} printable characters", is_name)
NAMES = Field(
    f"different names, each {NAME.says}",
    lambda v: list_of(NAME).fits(v) and len(set(v)) == len(v),
)
SIDE = whole(1, 4096)  # of a picture, in pixels
EPSILON = number(1e-12, 1)  # of a norm
CUT = {"packed_size": whole(8, 4096), "crop": one_of("centre", "figure"), "margin": number(0, 10)}
ENCODER = {  # what a ViT is built from
    "image_size": SIDE,
    "patch_size": whole(1, 512),
    "dim": whole(4, 2**14),
    "depth": whole(1, 1000),
    "heads": whole(1, 1000),
}


# ---- a file --------------------------------------------------------------------------------------


def check_fields(header, table, path, remedy):
    """A UserError that names the first field of a header that is not as its table says."""
    if not isinstance(header, dict):
        raise UserError(f"{path} is {short(header)} and has to be a table of fields; {remedy}")
    for key, field in table.items():
        name = key.removesuffix("?")
        value = header.get(name)
        if value is None and key.endswith("?"):
            continue
        if isinstance(field, dict):
            check_fields(value, field, f"{path}: {name}", remedy)
        elif name not in header:
            raise UserError(f"{path} has no field {name!r}; {remedy}")
        elif not field.fits(value):
            raise UserError(
                f"{path}: {name} is {short(value)} and has to be {field.says}; {remedy}"
            )


def check_arrays(arrays, table, path, remedy, **sizes):
    """The same for {name: array or tensor}. sizes: of the letters that are known; others are found."""
    for key, says in table.items():
        name, (dtype, *letters) = key.removesuffix("?"), says.split()
        if name not in arrays and key.endswith("?"):
            continue
        if name not in arrays:
            raise UserError(f"{path} has no array {name!r}; {remedy}")
        array = arrays[name]
        shape = tuple(array.shape)
        if len(shape) == len(letters):
            sizes = dict(zip(letters, shape, strict=True)) | sizes
        wanted = tuple(int(x) if x.isdigit() else sizes.get(x, x) for x in letters)
        if shape != wanted or dtype not in str(array.dtype):
            want = ", ".join(map(str, wanted))
            raise UserError(
                f"{path}: {name} is {array.dtype} {shape} and has to be {dtype} ({want}); {remedy}"
            )


def check_blocks(weights, name, depth, dim, path, remedy):
    """The blocks of a ViT, name.0 and so on, are in the file: a network is built only as large as it."""
    matrices = {f"{name}.{i}.mlp.fc1.weight": "float F D" for i in range(depth)}
    check_arrays(weights, matrices, path, remedy, D=dim, F=4 * dim)


def check_encoder(weights, shape, path, remedy, prefix=""):
    """The ViT that a header tells of has the shape of its weights in the file."""
    size, p, dim, depth, heads = (shape[k] for k in ENCODER)
    if size % p or dim % 4 or dim % heads:
        raise UserError(
            f"{path}: {size} px are no patches of {p}, or {dim} numbers no {heads} heads; {remedy}"
        )
    tokens = {f"{prefix}cls_token": "float 1 1 D", f"{prefix}pos_embed": "float 1 N D"}
    check_arrays(weights, tokens, path, remedy, D=dim, N=1 + (size // p) ** 2)
    check_blocks(weights, f"{prefix}blocks", depth, dim, path, remedy)


def check_equal(path, remedy, **pairs):
    """Of two values that a file gives for one thing, both have to be the same."""
    for name, (here, there) in pairs.items():
        if here != there:
            raise UserError(
                f"{path}: {name} is {short(here)}, and {short(there)} elsewhere; {remedy}"
            )


def check_range(array, low, high, name, path, remedy):
    """The same for the values of an array or tensor, which lie in [low, high)."""
    if math.prod(array.shape) and not (low <= array.min() and array.max() < high):
        raise UserError(
            f"{path}: {name} are {array.min()} to {array.max()} "
            f"and have to lie between {low} and {high - 1}; {remedy}"
        )


def check_finite(weights, path):
    """Weights that are NaN, infinite or huge answer NaN; the same for variances under 0."""
    for name, w in weights.items():
        low, w = 0 if name.endswith("running_var") else -LARGEST, w.float()
        if w.numel() and not (low <= w.min() and w.max() <= LARGEST):
            raise UserError(
                f"{path}: {name} has weights that are not finite, or larger than {LARGEST:g}; "
                "take another copy of the file, or make it again"
            )
