"""Pictures of the study: learning curves with bands, bars with intervals, ablations. Imports common.plots only."""

import math
import textwrap

import numpy as np

from common.plots import (
    BLUE,
    COLOURS,
    GREEN,
    INK,
    MARKERS,
    ORANGE,
    controls,
    panels,
    percent,
    plt,
    save,
)
from common.stats import LEAST_SEEDS

MOST = len(COLOURS)  # lines in one picture
WHISKERS = dict(ecolor=INK, elinewidth=1.2, capsize=3)  # of a 95 % interval


def short(arm, width=34):
    """An arm as a label of a line or two, without the braces of what was made first."""
    return textwrap.fill(arm.replace("{", "").replace("}", ""), width, break_on_hyphens=False)


def curves(path, done, thresholds, thumbnail, title):
    """done {arm: [curve of a seed]}: linear Top-1 in the run, by epoch and by minute; line: mean,
    band: a std.

    Of more arms than there are colours the first is drawn, and those that end highest; bands of up
    to four.
    """
    best = sorted(done, key=lambda arm: -np.mean([c["linear"][-1] for c in done[arm]]))
    first = next(iter(done))
    shown = [arm for arm in done if arm in [first, *[b for b in best if b != first][: MOST - 1]]]
    banded = len(shown) <= 4 and max(map(len, done.values())) >= LEAST_SEEDS
    labels = (
        "epochs" + "\n(band: one std over seeds)" * banded,
        "minutes of training\n(evaluations not counted)",
    )
    limits = zip(sorted(set(thresholds.values())), ("--", "-.", (0, (1, 3))), strict=False)
    limits = [(limit, style, f"threshold {limit:.1f} %") for limit, style in limits]
    with panels(path, title, 1, 2, (9.6, 4.6), sharey=True) as axes:
        for colour, marker, arm in zip(COLOURS, MARKERS, shown, strict=False):
            length = min(len(c["linear"]) for c in done[arm])
            top1 = np.array([c["linear"][:length] for c in done[arm]])  # (seeds, epochs)
            for axis, key, scale in ((axes[0], "epoch", 1), (axes[1], "seconds", 60)):
                x = np.mean([c[key][:length] for c in done[arm]], 0) / scale
                axis.plot(
                    x,
                    top1.mean(0),
                    color=colour,
                    marker=marker,
                    ms=4,
                    lw=1.8,
                    label=short(arm),
                    markevery=0.1,
                )
                if banded and len(top1) >= LEAST_SEEDS:
                    middle, std = top1.mean(0), top1.std(0, ddof=1)
                    axis.fill_between(x, middle - std, middle + std, color=colour, alpha=0.15, lw=0)
        for axis, label in zip(axes, labels, strict=True):
            controls(axis, [*limits, (thumbnail, ":", "4x4 thumbnails")])
            axis.set(xlabel=label)
        percent(axes[0])  # both share it
        axes[0].set(ylabel="linear Top-1 during the run, %")
        entries = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(*entries, loc="outside lower center", fontsize=8.5, ncols=3)


def bars(path, table, values, title):
    """table: of verdicts.summary; values {arm: [Top-1 of a seed]}. Left Top-1; right, with seeds,
    what an arm adds.
    """
    table = sorted(table, key=lambda line: line["top1"]["mean"])
    compared = any(line.get("difference", {}).get("low") is not None for line in table)
    size = (9.6, 1.5 + 0.32 * len(table))
    with panels(path, title, 1, 1 + compared, size, sharey=True, squeeze=False) as axes:
        left = axes[0, 0]
        for y, line in enumerate(table):
            left.plot(values[line["arm"]], np.full(line["n"], y), "|", ms=9, color=BLUE, alpha=0.7)
            left.errorbar(
                line["top1"]["mean"],
                y,
                xerr=line["top1"]["half"],
                fmt="o",
                ms=5,
                color=BLUE,
                **WHISKERS,
            )
        left.set_ylim(-0.6, len(table) - 0.4)
        left.set_yticks(range(len(table)), [short(line["arm"]) for line in table], fontsize=8.5)
        whiskers = any(line["top1"]["half"] is not None for line in table)
        seeds = "tick: a seed" + "; whiskers: 95 % interval over seeds" * whiskers
        left.set(xlabel=f"Top-1 of a logistic regression, %\n({seeds})")
        percent(left, "x")
        left.grid(axis="x", color="#DDDDDD", lw=0.6)
        left.set_axisbelow(True)
        if compared:
            differences(axes[0, 1], table)


def differences(axis, table):
    """What each arm adds to its baseline, as a bar with its interval; lines of the table are one
    under the other.
    """
    for y, test in enumerate(line.get("difference") for line in table):
        if test and test["low"] is not None:
            colour = GREEN if test["low"] > 0 else ORANGE if test["high"] < 0 else "#BBBBBB"
            axis.barh(y, test["effect"], 0.6, color=colour)
            axis.errorbar(
                test["effect"], y, xerr=test["high"] - test["effect"], fmt="none", **WHISKERS
            )
    axis.set(
        xlabel="difference to its baseline, points\n(green: above 0, orange: below, gray: open)"
    )
    axis.axvline(0, color=INK, lw=0.8)
    axis.tick_params(left=False)


def grid(path, panels, table, title):
    """panels {factor: {line: {level: arm}}}: Top-1 by level, one panel for each factor, 95 %
    intervals over seeds.

    What was not run is not drawn: levels, lines, and panels with nothing to compare.
    """
    top1, planned, panels = {line["arm"]: line["top1"] for line in table}, panels, {}
    for factor, lines in planned.items():
        lines = {
            n: {level: top1[arm] for level, arm in arms.items() if arm in top1}
            for n, arms in lines.items()
        }
        if sum(map(len, lines.values())) > 1:
            panels[factor] = {name: levels for name, levels in lines.items() if levels}
    wide = [
        f for f, lines in panels.items() if max(map(len, lines.values())) > 6
    ]  # names need the whole width
    small = [f for f in panels if f not in wide]
    columns = min(3, len(small)) or 1
    rows = math.ceil(len(small) / columns) + len(wide)
    figure = plt.figure(figsize=(9.6, 3.0 * rows + 0.4))
    figure.suptitle(f"{title}\n(whiskers: 95 % interval over seeds; open: too few seeds for one)")
    places, shared = (
        figure.add_gridspec(rows, columns),
        None,
    )  # one scale: a factor that matters is seen to matter
    for i, factor in enumerate(small + wide):
        place = (
            places[i // columns, i % columns]
            if factor in small
            else places[rows - len(wide) + i - len(small), :]
        )
        shared = figure.add_subplot(place, sharey=shared)
        panel(shared, factor, panels[factor])
    if shared:
        percent(shared)
    save(figure, path)


def panel(axis, factor, lines):
    """lines {name: {level: Top-1}}; an open marker has no interval: too few seeds."""
    levels = list(dict.fromkeys(level for own in lines.values() for level in own))
    for i, (colour, marker, (name, own)) in enumerate(
        zip(COLOURS, MARKERS, lines.items(), strict=False)
    ):
        x = [levels.index(level) + 0.08 * (i - (len(lines) - 1) / 2) for level in own]
        half = [t["half"] or 0 for t in own.values()]
        style = (
            f"{marker}-" if all(level.replace(".", "").isdigit() for level in levels) else marker
        )  # names: no line
        axis.errorbar(
            x,
            [t["mean"] for t in own.values()],
            yerr=half,
            fmt=style,
            ms=5,
            lw=1.4,
            capsize=3,
            color=colour,
            label=short(name, 26),
        )
        for k, t in zip(x, own.values(), strict=True):
            if t["half"] is None:
                axis.plot(k, t["mean"], marker, ms=5, mfc="white", color=colour, zorder=3)
    axis.set_xticks(range(len(levels)), levels, fontsize=8.5, rotation=25 if len(levels) > 6 else 0)
    axis.set_title(factor if len(lines) > 1 else f"{factor}: {next(iter(lines))}", fontsize=10)
    axis.set(ylabel="Top-1, %")
    axis.margins(x=0.12)
    if len(lines) > 1:
        axis.legend(fontsize=8)
