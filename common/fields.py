"""Checks of what a file says: the fields of its header, and the shapes of its arrays.

A table of a header is {name: rule}. A rule is a function of the value that returns a bool, or the
table of a header inside the header. A table of arrays is {name: "dtype n D"}: the kind of number,
then a letter or a number for each dimension. A name that ends in "?" may be missing; in a header
it may also be null.
"""

import re
import reprlib
import unicodedata

from common.io import UserError

LETTERS = 100  # of a name
JOINER = "\u200d"  # makes one emoji of several
LARGEST = 1e6  # absolute value of a weight: a network of larger ones overflows
# The lowest and the highest value of a key, on the command line and in a file: first those of a
# network, then of --method, --head and --crop, of a loss, of a mask. Others may be any number. Bounds of
# whole numbers are whole, as 1, and those of others are not, as 1.0.
BOUNDS = {"image_size": (1, 4096), "patch_size": (1, 512), "dim": (4, 2**14), "depth": (1, 1000)}
BOUNDS |= {"heads": (1, 1000), "decoder_dim": (1, 2**14), "decoder_depth": (0, 1000)}
BOUNDS |= {"decoder_heads": (1, 1000), "simmim": (0, 1), "r": (1, 2**14), "alpha": (0.0, LARGEST)}
BOUNDS |= {"layer_decay": (0.0, 1.0), "margin": (0.0, 2.0), "scale": (1e-6, LARGEST)}
BOUNDS |= {"weight": (0.0, 1e3), "temperature": (1e-3, 100.0), "dcl": (0, 1)}
BOUNDS |= {"every": (1, 10**6), "share": (1e-3, 1.0), "shuffle": (0, 1), "throw": (0.0, 1.0)}
BOUNDS |= {"start": (0.0, 1.0), "ramp_for": (0.0, 1.0), "hint": (0.0, 1.0), "size": (0.0, 1.0)}
BOUNDS |= {"unit": (1, 512), "power": (0.0, 100.0), "spare": (0, 10**6), "whole": (-1.0, 1.0)}
BOUNDS |= {"fine": (1e-3, 100.0), "coarse": (1e-3, 100.0)}


def shown(text):
    """Text of a file for a terminal: what is neither printable nor a space nor joins emoji is escaped."""
    printable = [c.isprintable() or unicodedata.category(c) == "Zs" or c == JOINER for c in text]
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
    return isinstance(value, str) and len(value) <= 4096 and "\0" not in value  # no path has one


def are_names(value):
    return list_of(is_name)(value) and len(set(value)) == len(value)


TEXT, NAMES = is_text, are_names
SIDE = whole(*BOUNDS["image_size"])  # of a picture, in pixels
EPSILON = number(1e-12, 1)  # of a norm
CUT = {"packed_size": whole(8, 4096), "crop": one_of("centre", "figure")}
CUT |= {"margin": number(*BOUNDS["margin"])}
SIZES = ("image_size", "patch_size", "dim", "depth", "heads")
ENCODER = {name: whole(*BOUNDS[name]) for name in SIZES}  # of a ViT

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
        actual = f"{array.dtype} {tuple(array.shape)}"
        if len(array.shape) == len(letters):
            sizes = dict(zip(letters, array.shape, strict=True)) | sizes
        wanted = tuple(int(x) if x.isdigit() else sizes.get(x, x) for x in letters)
        if tuple(array.shape) != wanted or not re.search(rf"\bb?{dtype}", actual):
            raise UserError(f"{path}: {name} is {actual}, not {dtype} {wanted}; {remedy}")


def check_range(array, low, high, name, path, remedy):
    """A UserError if a value of an array or tensor lies outside [low, high)."""
    if 0 not in array.shape and not (low <= array.min() and array.max() < high):
        raise UserError(f"{path}: {name} are not in [{low}, {high}); {remedy}")


def check_finite(weights, path):
    """Weights that are NaN, infinite or huge answer NaN; so do variances under 0."""
    for name, w in weights.items():
        low = 0 if name.endswith("running_var") else -LARGEST
        check_range(w.float(), low, LARGEST, name, path, "take another copy, or make it again")
