"""Tables of results as CSV files, to which experiments and benchmarks add rows."""

import csv
from pathlib import Path

from common.io import UserError, atomic


def read_csv(path):
    """-> list of dicts; none where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def save_csv(path, rows):
    """Write rows (dicts with the same keys) as CSV, atomically."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def rows_there(path, columns):
    """-> rows of a CSV to which others will be added, none where there is no file; refuses what is
    no such table.
    """
    if Path(path).is_symlink() and not Path(path).exists():
        raise UserError(f"{path} is a link to nowhere; give another --out")
    try:
        rows = read_csv(path)
    except (ValueError, csv.Error):
        rows = [{}]
    if lost := [c for c in columns if any(row.get(c) is None for row in rows)]:
        raise UserError(
            f"{path} is there already, and no such table (it has no column {lost[0]}); give another --out"
        )
    return rows


def replace_rows(path, rows, keys):
    """Write rows to a CSV in the place of those that have the same values under these keys."""
    made = {tuple(str(r[k]) for k in keys) for r in rows}
    rows = [r for r in rows_there(path, keys) if tuple(r[k] for k in keys) not in made] + rows
    columns = dict.fromkeys(c for r in rows for c in r)  # an older table may have others
    save_csv(path, [{c: r.get(c, "") for c in columns} for r in rows])
