"""Would the tests notice a mistake? Make small mistakes in a file, one at a time, and run tests on each.

    python tests/house/mutants.py lab/stats.py --tests tests/lab/test_stats.py --count 40

Works on a copy of the repository in a temporary folder. A mutant is killed when the tests fail
or do not end. The survivors are printed. Exit status 1: fewer than 90 % are killed.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAIRS = "Add Sub, Mult Div, BitAnd BitOr, And Or, Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn"
OPERATORS = {ast.Pow: ast.Mult, ast.Mod: ast.Mult, ast.FloorDiv: ast.Mult}
for pair in PAIRS.split(", "):
    one, other = (getattr(ast, name) for name in pair.split())
    OPERATORS |= {one: other, other: one}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "cdf": "sf", "sf": "cdf"}


def changed(node, **fields):
    """A copy of a node with other fields, as text."""
    old = {name: getattr(node, name) for name in node._fields}
    return ast.unparse(type(node)(**(old | fields)))


def of_number(node):
    """Off by one; half of a fraction, and one for zero; the other truth value."""
    value = node.value
    if isinstance(value, bool):
        return [repr(not value)]
    if isinstance(value, int):
        return [str(value + 1), str(value - 1)]
    return [repr(value / 2 or 1.0)] if isinstance(value, float) else []


def of_operation(node):
    """Each operand alone, and another operator."""
    found = [ast.unparse(x) for x in ast.iter_child_nodes(node) if isinstance(x, ast.expr)]
    operator = OPERATORS.get(type(getattr(node, "op", None)))
    return found + ([changed(node, op=operator())] if operator else [])


def of_comparison(node):
    """Another bound at each place of a chain."""
    places = [(node.ops[:i], op, node.ops[i + 1 :]) for i, op in enumerate(node.ops)]
    return [changed(node, ops=[*a, OPERATORS[type(op)](), *b]) for a, op, b in places]


def of_call(node):
    """Two arguments swapped, side by side. Those of min and max may change places."""
    args = node.args if ast.unparse(node.func) not in ("min", "max") else []
    pairs = [(args[:i], args[i : i + 2], args[i + 2 :]) for i in range(len(args) - 1)]
    return [changed(node, args=[*a, second, first, *b]) for a, (first, second), b in pairs]


def of_name(node):
    fields = {k: NAMES[x] for k, x in ast.iter_fields(node) if isinstance(x, str) and x in NAMES}
    return [changed(node, **fields)] if fields else []


KINDS = dict.fromkeys((ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.IfExp), of_operation)
KINDS |= {ast.Constant: of_number, ast.Compare: of_comparison, ast.Call: of_call}
KINDS |= {ast.Name: of_name, ast.Attribute: of_name}


def expressions(node):
    """Every expression below a node; what stands in f-strings has no exact place in the text."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield child
            yield from expressions(child)


def all_mutants(source):
    """-> [(line, text before, text after, whole source)], each of which is Python."""
    lines, found = source.encode().splitlines(keepends=True), []
    for node in expressions(ast.parse(source)):
        for after in KINDS[type(node)](node) if type(node) in KINDS else ():
            first = len(b"".join(lines[: node.lineno - 1])) + node.col_offset
            last = len(b"".join(lines[: node.end_lineno - 1])) + node.end_col_offset
            text = b"".join(lines)
            mutant = (text[:first] + f"({after})".encode() + text[last:]).decode()
            try:
                compile(mutant, "mutant", "exec")
            except SyntaxError:
                continue
            found.append((node.lineno, ast.unparse(node), after, mutant))
    return found


def copy_of(root, folder):
    """Copy the code; what git and the tests only read is linked."""
    left_out = (".git", "runs", "datasets", "__pycache__", ".*_cache", "venv", ".venv")
    copy = shutil.copytree(root, folder / root.name, ignore=shutil.ignore_patterns(*left_out))
    for name in (".git", "../shared"):
        if (root / name).exists():
            os.symlink((root / name).resolve(), copy / name)
    return copy


def passes(copy, tests):
    """Do the tests pass there? A mutant that never ends is killed after five minutes."""
    command = [sys.executable, "-m", "pytest", "-qx", "-n0", "-pno:cacheprovider", *tests]
    env = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, timeout=300)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="such as lab/stats.py")
    parser.add_argument("--tests", nargs="+", required=True, metavar="TEST", help="for pytest")
    parser.add_argument("--count", type=int, default=40, help="mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mutants = all_mutants((ROOT / args.file).read_text())
    some = random.Random(args.seed).sample(mutants, min(args.count, len(mutants)))
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of(ROOT, Path(folder))
        if not passes(copy, args.tests):
            sys.exit("the tests fail on the file as it is, so they say nothing about mutants")
        for line, before, after, text in sorted(some):
            (copy / args.file).write_text(text)
            if not passes(copy, args.tests):
                killed += 1
                continue
            print(f"survived, {args.file}:{line}: {before}  ->  {after}", flush=True)
    share = 100 * killed / len(some)
    print(f"{killed} of {len(some)} mutants killed, {share:.0f} % ({len(mutants)} are possible)")
    sys.exit(share < 90)


if __name__ == "__main__":
    main()
