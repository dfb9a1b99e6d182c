"""What every command has: flags, one line for each mistake, locks on what it writes, a progress bar."""

import argparse
import contextlib
import itertools
import os
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from common.fields import BOUNDS, shown
from common.io import FULL, UserError, one_line, quoted, temporary_files

NO_MEMORY = f"{FULL}|OutOfMemory|MemoryError|alloc_cpu|calculation overflowed"
QUIET = 10  # seconds between two states of a bar where output is piped
AT_END = contextlib.ExitStack()  # what a command lets go of when it ends, as its locks


def cli(main):
    """Run a stage's main; a mistake becomes one line on stderr (one a process) and exit status 2."""
    open_streams()
    with contextlib.suppress(AttributeError):  # a file's name may be no text at all
        for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "surrogateescape")):
            # A pipe is UTF-8 everywhere. On Windows it would be a code page, which lacks most names.
            encoding = None if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors=errors)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has enough: `| head`
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError, MemoryError, RuntimeError) as problem:
        line = in_one_line(problem)
        if line is None:
            raise
        start = f"error in process {os.environ['RANK']}" if launched() else "error"
        print(f"{start}: {shown(' '.join(line.splitlines()))}", file=sys.stderr)
        sys.exit(2)
    finally:
        AT_END.close()
        temporary_files.cache_clear()


def open_streams():
    """A shell can start a process without them (`>&-`): what is printed then goes nowhere."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (it ends with the process)


def launched():
    """Whether torchrun started this process. One of its variables alone is left over from elsewhere."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def in_one_line(problem):
    """What a user is told of a mistake, a file or full memory; None for a fault of the code."""
    if isinstance(problem, UserError):
        return str(problem)
    if isinstance(problem, OSError):
        reason = problem.strerror or problem
        return f"{problem.filename or 'a file'} can't be read or written: {reason}"
    if "Symlink loop" in str(problem):  # pathlib's, up to Python 3.12
        return f"{problem}: a link leads back to itself"
    if re.search(NO_MEMORY, f"{type(problem).__name__} {problem}"):
        return "memory is full; give a smaller --batch-size, --image-size or --model"


@contextlib.contextmanager
def drawing(what):
    """with drawing("curves.png"): a figure that fails is a line, for the results stand already."""
    try:
        yield
    except Exception as problem:  # matplotlib raises whatever it meets
        print(f"note: {what} could not be drawn ({shown(one_line(problem))})", file=sys.stderr)


def command():
    """The command line that this is, for results: the script by its name, wherever it lies."""
    words = [Path(word).name for word in started_as()]
    return shlex.join(["python", *words, *sys.argv[1:]])


def started_as():
    """What follows `python` to start this script again: its path, or -m apps.tags of one in a folder."""
    script = Path(sys.argv[0])
    if script.parent.name in ("apps", "ingest", "lab"):
        return ["-m", f"{script.parent.name}.{script.stem}"]
    return [sys.argv[0]]


# ---- flags ---------------------------------------------------------------------------------------

NOT_IN_NAME = {"out", "data", "device", "log", "resume"}  # of a run
MOST = 10**9  # of anything that is counted: what is larger is a slip of the hand


def between(low, high, kind=float):
    """-> an argparse type: a finite number of this kind in [low, high]."""

    def number(text):
        value = kind(text)  # argparse says so where that is none
        if not low <= value <= high:  # never true of nan
            bounds = f"between {low:g} and {high:g}" if high < MOST else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text} must be a number {bounds}")
        return value

    number.__name__ = "whole number" if kind is int else "number"
    return number


def at_least(low, kind=int):
    """-> an argparse type: a finite number of this kind, `low` or more."""
    return between(low, MOST, kind)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError. manual: the docstring of the script.

    The namespace has one more attribute, `given`: the names of the flags on the command line.
    """

    def __init__(self, manual=None, **options):
        ours = {"formatter_class": argparse.RawTextHelpFormatter, "allow_abbrev": False}
        ours["description"] = (manual or "").partition("\n")[0]  # python -OO leaves no docstring
        ours["prog"] = " ".join(["python", *(Path(word).name for word in started_as())])
        super().__init__(**(ours | options))

    def error(self, message):
        raise UserError(message.removeprefix("argument ").replace(": ", " ", 1))

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        args, rest = super().parse_known_args(words, namespace)
        flags = [word.partition("=")[0] for word in itertools.takewhile("--".__ne__, words)]
        known = {name: action.dest for name, action in self._option_string_actions.items()}
        given = [known[flag] for flag in flags if flag in known]
        args.given = getattr(args, "given", set()) | {*given}
        for name in args.given:
            flag, value = f"--{name.replace('_', '-')}", getattr(args, name, None)
            if value == "" or f"{flag}=--" in words:
                self.error(f"{flag} gives no value")
            if given.count(name) > 1:
                self.error(f"{flag} is given twice; which one counts?")
            if re.search("[\ud800-\udfff]", str(value)):  # bytes that are no text
                fix = "give other letters, or set PYTHONUTF8=1 if they are right"
                self.error(f"{flag} is not UTF-8; {fix}")
        return args, rest


def refuse_useless(names, where):
    """Nothing that was given is ignored. names: the given flags that nothing would read."""
    for name in sorted(names):
        raise UserError(f"--{name.replace('_', '-')} has no effect {where}; leave it out")


def set_defaults(flags, **defaults):
    """Defaults that depend on the machine, the model or the method: flags not given take them."""
    for name, value in defaults.items():
        if name not in flags.given:
            setattr(flags, name, value)


def run_name(flags, *first, only=None):
    """ "toon-mask-attn_high-seed-1": what a run is called, by the flags that were given, or some only."""
    given = flags.given - NOT_IN_NAME if only is None else flags.given & only
    words = [f"{name}-{getattr(flags, name)}" for name in vars(flags) if name in given]
    return re.sub(r"[^\w.-]+", "-", "-".join([*first, *words]))


def parse_keys(text, choices, flag):
    """ "lora:r=4,alpha=8" -> ("lora", {"r": 4, "alpha": 8}): a name, and values for its keys.

    choices {name: {key: default}}: a value gets its default's type, and is a number where that is
    None, within the BOUNDS of its key. Others are a UserError that says what there is.
    """
    name, _, pairs = text.partition(":")
    if name not in choices:
        raise UserError(f"{flag} {name} is unknown; choose from {', '.join(choices)}")
    values = dict(choices[name])
    for pair in filter(None, pairs.split(",")):
        key, _, value = pair.partition("=")
        if key not in values:
            known = ", ".join(values) or "no keys"
            raise UserError(f"{flag} {name} has no key {key!r}; it has {known}")
        default = values[key]
        kind = {bool: int, type(None): float}.get(type(default), type(default))  # bool("0") is True
        low, high = BOUNDS.get(key, (-MOST, MOST))
        outside = isinstance(default, int | float) and not low <= default <= high
        if outside or (type(default) is int and type(low) is float):
            low, high = -MOST, MOST  # a key of your own, which means something else
        try:
            values[key] = value if kind is str else between(low, high, kind)(value)
        except (ValueError, argparse.ArgumentTypeError):
            whole = "whole " if kind is int else ""
            problem = (
                f"{value!r} must be a {whole}number from {low:g} to {high:g} (common/fields.py)"
            )
            raise UserError(f"{flag} {name}:{pair}: {problem}") from None
    return name, values


def each_flag_once(words):
    """Words of a command, each flag with its values once; of one that is there twice, the later."""
    groups, name = {}, None  # a flag and its values
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            groups[name] = []
        groups.setdefault(name, []).append(word)
    return [word for group in groups.values() for word in group]


def require(extra, *libraries):
    """A library of an extra of pyproject.toml that is missing is named before the work begins."""
    for name in libraries:
        if not find_spec(name):
            raise UserError(f'{name} is missing: pip install -e ".[{extra}]"')


# ---- files that are there already ----------------------------------------------------------------


def refuse_overwrite(paths, fix="choose another --out"):
    """Nothing that exists is overwritten: the line says what to do instead, and what removes it."""
    there = [str(path) for path in paths if os.path.lexists(path)]
    if there:
        raise UserError(f"{there[0]} is there already; {fix}, or rm -r {quoted(*there)}")


# ---- while it works ------------------------------------------------------------------------------


def progress(items=None, name=None, total=None, **options):
    """tqdm's bar; where output is piped, it is written every ten seconds. TQDM_DISABLE=1: none."""
    if not sys.stderr.isatty():
        options |= {"mininterval": QUIET, "delay": QUIET, "ascii": True}
    # tqdm reads this variable itself, but only where a call says nothing of `disable`.
    if os.environ.get("TQDM_DISABLE"):
        options["disable"] = True
    return tqdm(items, name, total, **options)
