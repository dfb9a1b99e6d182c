"""Figures of experiments/stress.py: Top-1 under corruptions, by part, and hidden pixels by ratio."""

import numpy as np

from common.plots import (
    BLUE,
    COLOURS,
    INK,
    MARKERS,
    ORANGE,
    controls,
    panels,
    percent,
    plot_rows,
)


def robustness(path, report, sweeps, title):
    """Top-1 by level of every sweep, the clean level (dashed) and chance (dotted); single-level
    ones as bars.
    """
    single = {
        n: top1
        for n, levels in report["robustness"].items()
        if len(levels) == 1
        for top1 in levels.values()
    }
    curves = {n: levels for n, levels in report["robustness"].items() if n not in single}
    with panels(path, title, 2, 4, (11.5, 5.2), sharey=True) as axes:
        *left, bars, sizes = axes.flat[: len(curves) + 2]
        for axis, (name, levels) in zip(left, curves.items(), strict=True):
            axis.plot(range(len(levels)), levels.values(), "o-", color=BLUE)
            axis.set_xticks(range(len(levels)), levels)
            axis.set(title=name, xlabel=sweeps[name][2])
        bars.bar(range(len(single)), single.values(), 0.55, color=BLUE)
        bars.set_xticks(range(len(single)), single)
        bars.set(title="without colour")
        plot_rows(sizes, report["resolution"], "side", "top1", "o-", color=BLUE)
        sizes.set(title="resolution", xlabel="side of the view, px", xscale="log")
        sides = [r["side"] for r in report["resolution"]]
        some = [
            b for a, b in zip([0, *sides], sides, strict=False) if b > 1.3 * a
        ]  # labels must not touch
        sizes.set_xticks(some, some)
        sizes.minorticks_off()
        for i, axis in enumerate(axes.flat):
            controls(axis, [(report["clean"], "--", None), (report["chance"], ":", None)])
            axis.set_visible(i < len(curves) + 2)
        for axis in axes[:, 0]:
            axis.set(ylabel="Top-1, % (dashed: clean)")
            percent(axis, low=0)


def parts(path, report, title):
    """Top-1 with each part painted gray, beside the same shape elsewhere."""
    rows = report["parts"]
    kinds = {
        "hidden": (-0.2, BLUE, "", "the part is gray"),
        "control": (0.2, ORANGE, "//", "the same shape elsewhere is gray"),
    }
    with panels(path, title, 1, 1, (7.2, 3.6)) as axis:
        for key, (shift, colour, hatch, label) in kinds.items():
            place, values = np.arange(len(rows)) + shift, [r[key] for r in rows.values()]
            axis.bar(place, values, 0.38, color=colour, hatch=hatch, edgecolor="white", label=label)
        controls(axis, [(report["clean"], "--", "clean"), (report["chance"], ":", "chance")])
        axis.set_xticks(
            range(len(rows)), [f"{n}\n{100 * r['area']:.1f} %" for n, r in rows.items()], fontsize=9
        )
        axis.set(xlabel="part, and its share of the picture", ylabel="Top-1, %")
        percent(axis, low=0)
        axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside right")


def reconstruction(path, rows, title):
    """PSNR on hidden pixels by ratio, a line per strategy; dotted: the mean colour of what is seen,
    random masks.
    """
    of = {
        name: [r for r in rows if r["strategy"] == name]
        for name in dict.fromkeys(r["strategy"] for r in rows)
    }
    with panels(path, title, 1, 2, (9.8, 4.2)) as axes:
        for axis, key, label in zip(
            axes, ("psnr", "ssim"), ("PSNR on hidden pixels, dB", "SSIM there"), strict=True
        ):
            for i, (name, own) in enumerate(of.items()):
                style = {
                    "color": COLOURS[i % 8],
                    "marker": MARKERS[i % 8],
                    "ls": "-" if i < 8 else "--",
                    "ms": 5,
                }
                plot_rows(axis, own, "ratio", key, label=name, **style)
            axis.set(xlabel="share of patches hidden", ylabel=label)
        plot_rows(
            axes[0], of.get("random", []), "ratio", "psnr_flat", ":", color=INK, label="mean colour"
        )
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
