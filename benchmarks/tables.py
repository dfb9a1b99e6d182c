"""Tables of measurements as CSV files, to which benchmarks add rows.

python -m benchmarks.tables FOLDER          prints all of a folder as tables of Markdown
"""

import csv
import sys
from pathlib import Path

from common.io import UserError


def read_csv(path):
    """-> list of dicts; none where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def rows_there(path, columns):
    """-> the rows of a CSV to which others will be added; what is no such table is refused."""
    if Path(path).is_symlink() and not Path(path).exists():
        raise UserError(f"{path} is a link to nowhere; give another --out")
    try:
        rows = read_csv(path)
    except (ValueError, csv.Error):
        rows = [{}]
    if lost := [c for c in columns if any(row.get(c) is None for row in rows)]:
        problem = f"no such table (it has no column {lost[0]})"
        raise UserError(f"{path} is there already, and {problem}; give another --out")
    return rows


def markdown(rows):
    """-> lines: what all rows have in common, then a table of the columns that differ."""
    columns = [c for c in rows[0] if len({row[c] for row in rows}) > 1] or list(rows[0])
    common = [f"{name} {value}" for name, value in rows[0].items() if name not in columns]
    table = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    return [", ".join(common), "", *(f"| {' | '.join(cells)} |" for cells in table), ""]


if __name__ == "__main__":
    for file in sorted(Path(sys.argv[1]).glob("*.csv")):
        print(f"## {file.stem}", "", *markdown(read_csv(file)), sep="\n")
