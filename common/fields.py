"""Checks of what a file says: the fields of its header, and the shapes of its arrays.

A table of a header is {name: rule}. A rule is a function of the value that returns a bool, or the
table of a header inside the header. A table of arrays is {name: "dtype n D"}: the kind of number,
then a letter or a number for each dimension. A name that ends in "?" may be missing; in a header
it may also be null.
"""

import reprlib
import unicodedata

from common.io import UserError

LETTERS = 100  # of a name
LARGEST = 1e6  # absolute value of a weight: a network of larger ones overflows


def shown(text):
    """Text of a file for a terminal: what is neither printable nor a space is escaped."""
    printable = [c.isprintable() or unicodedata.category(c) == "Zs" for c in text]
    return "".join(c if ok else ascii(c)[1:-1] for c, ok in zip(text, printable, strict=True))


def short(value):
    """A value for a message, its middle left out where it is long."""
    return shown(reprlib.repr(value))


# ---- rules of a header's fields ------------------------------------------------------------------


def whole(low, high=10**9):
    return lambda value: type(value) is int and low <= value <= high


def number(low=-LARGEST, high=LARGEST):
    return lambda value: type(value) in (int, float) and low <= value <= high


def one_of(*values):
    return lambda value: value in values


def list_of(rule, least=0, most=10**8):
    return lambda x: isinstance(x, list) and least <= len(x) <= most and all(map(rule, x))


def is_name(value):
    return isinstance(value, str) and 0 < len(value) <= LETTERS and shown(value) == value


def is_text(value):
    return isinstance(value, str) and len(value) <= 4096


def are_names(value):
    return list_of(is_name)(value) and len(set(value)) == len(value)


TEXT, NAMES = is_text, are_names
SIDE = whole(1, 4096)  # of a picture, in pixels
EPSILON = number(1e-12, 1)  # of a norm
CUT = {"packed_size": whole(8, 4096), "crop": one_of("centre", "figure"), "margin": number(0, 10)}
ENCODER = {"image_size": SIDE, "patch_size": whole(1, 512), "dim": whole(4, 2**14)}  # of a ViT
ENCODER |= {"depth": whole(1, 1000), "heads": whole(1, 1000)}

# ---- a file --------------------------------------------------------------------------------------


def check_fields(header, table, path, remedy):
    """A UserError that names the first field of a header that breaks its rule."""
    if not isinstance(header, dict):
        raise UserError(f"{path} has to be a table of fields, not {short(header)}; {remedy}")
    for key, rule in table.items():
        name = key.removesuffix("?")
        value = header.get(name)
        if value is None and key != name:
            continue
        if isinstance(rule, dict):
            check_fields(value, rule, f"{path}: {name}", remedy)
        elif not rule(value):
            raise UserError(f"{path}: {name} can't be {short(value)}; {remedy}")


def check_arrays(arrays, table, path, remedy, **sizes):
    """A UserError that names the first array or tensor of another dtype or shape than in the table.

    sizes {letter: length}: those that are known. Others are those of the first array that has them.
    """
    for key, says in table.items():
        name = key.removesuffix("?")
        if name not in arrays and key != name:
            continue
        if name not in arrays:
            raise UserError(f"{path} has no array {name!r}; {remedy}")
        array = arrays[name]
        dtype, *letters = says.split()
        found = f"{array.dtype} {tuple(array.shape)}"
        if len(array.shape) == len(letters):
            sizes = dict(zip(letters, array.shape, strict=True)) | sizes
        wanted = tuple(int(x) if x.isdigit() else sizes.get(x, x) for x in letters)
        if tuple(array.shape) != wanted or dtype not in str(array.dtype):
            raise UserError(f"{path}: {name} is {found}, not {dtype} {wanted}; {remedy}")


def check_range(array, low, high, name, path, remedy):
    """A UserError if a value of an array or tensor lies outside [low, high)."""
    if 0 not in array.shape and not (low <= array.min() and array.max() < high):
        raise UserError(f"{path}: {name} are not in [{low}, {high}); {remedy}")


def check_finite(weights, path):
    """Weights that are NaN, infinite or huge answer NaN; so do variances under 0."""
    for name, w in weights.items():
        low = 0 if name.endswith("running_var") else -LARGEST
        check_range(w.float(), low, LARGEST, name, path, "take another copy, or make it again")
