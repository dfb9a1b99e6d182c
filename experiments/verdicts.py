"""From rows to numbers and verdicts: pure functions. A row is one run, as experiments/study.py writes it.

rows: {arm: {seed: row}}; plan: PLAN.json; groups (n,): the illustration of each image of the
reported split. A hypothesis is a list of tests, plans.py: what is compared, an arm, against which,
and the claim. TEST there says when it is supported or refuted.
"""

import numpy as np

from common import metrics
from common.stats import bootstrap, from_bits, mean_std
from experiments import plans, stats

UNITS = {
    "top1": "points of Top-1",
    "cutout": "points under Cutout .3",
    "finetuned": "points fine-tuned",
    "epochs": "% of the epochs saved",
    "log_epochs": "% of the epochs saved, by logarithms",
    "variance": "% less variance",
}
# metrics of a run, and what the difference to the baseline is called in the line of an arm
DIFFERENCES = {
    "top1": "difference",
    "cutout": "cutout_difference",
    "finetuned": "finetuned_difference",
}
BITS = {
    "top1": "logistic",
    "cutout": "cutout",
    "finetuned": "finetuned",
}  # where each image's right or wrong is kept
SEEDS_ALONE = "seeds alone"  # what an interval is over where no image's right or wrong is kept
TEN = 10  # seeds that a comparison of variances needs: at three, F(2, 2) asks for a ratio of 19


def by_arm(plan, rows):
    """Rows that count for a plan -> {arm: {seed: row}}; runs that diverged are left out."""
    found = {arm: {} for arm in plan["arms"]}
    for row in rows:
        planned = row["arm"] in found and row["seed"] in plan["seeds"]
        if (
            planned
            and row["key"] == plans.key(plan, row["arm"], row["seed"])
            and "error" not in row
        ):
            found[row["arm"]][row["seed"]] = row
    return found


# ---- one test: a difference, its interval and p --------------------------------------------------


def measure(test, plan, rows, groups):
    """A test of a hypothesis -> itself with n, effect, low, high, p, p_against, bootstrap, power,
    needed, notes.

    p: of no effect, two-sided; p_against: of an effect as large as the claim, one-sided. Both are 1
    where the data can't tell: a threshold that was not reached. Under three seeds, or where all
    tie, there is no interval and no p.
    """
    pairs, what, claim = pair_up(test, rows), test["what"], test["claim"]
    empty = dict.fromkeys(
        ("effect", "low", "high", "p", "p_against", "bootstrap", "power", "needed")
    )
    result = (
        test
        | {"n": len(pairs), "planned": len(plan["seeds"]), "unit": UNITS[what], "over": SEEDS_ALONE}
        | empty
    )
    result["notes"] = []
    if what == "variance":
        return result | of_variance(pairs)
    if what in ("epochs", "log_epochs"):
        return result | of_epochs(
            pairs, plan["thresholds"].get(test["against"]), claim, what == "log_epochs"
        )
    if not pairs or not all(BITS[what] in row["right"] for pair in pairs for row in pair):
        return result | of_differences(
            [a["metrics"][what] - b["metrics"][what] for a, b in pairs], claim
        )
    right = [[from_bits(row["right"][BITS[what]], len(groups)) for row in pair] for pair in pairs]
    each = np.array([100.0 * a - 100.0 * b for a, b in right])  # (seeds, images)
    result |= of_differences(each, claim, groups) | {"over": "seeds and illustrations"}
    return result if result["p"] is None else result | {"bootstrap": bootstrap(each, groups)}


def pair_up(test, rows):
    """-> [(row, row of the baseline)] of the seeds that both arms have."""
    arm, base = rows.get(test["arm"], {}), rows.get(test["against"], {})
    return [(arm[s], base[s]) for s in sorted(arm.keys() & base.keys())]


def no_interval(values):
    """What a test says where its paired differences allow no interval: at most their mean."""
    return {
        "effect": float(np.mean(values)) if len(values) else None,
        "per_seed": [float(v) for v in values],
        "notes": [stats.why_none(values)],
    }


def of_differences(values, claim, groups=None):
    """Paired differences -> interval, p values, and what n seeds can see.

    values: of seeds; or with groups, the illustration of each image, (seeds, images), and the
    interval is of both. power: chance that n seeds tell an effect as large as the claim from none,
    the std being the one found; needed: seeds that would in four of five studies (where only "more"
    is claimed: the effect that was found, if any).
    """
    each = np.asarray(values, np.float64) if groups is None else np.mean(values, 1)
    if (t := stats.paired_t(values, groups)) is None:
        return no_interval(each)
    std, images = (
        float(np.std(each, ddof=1)),
        (0.0, 1) if groups is None else stats.image_variance(values, groups),
    )
    effect = claim or max(0.0, float(t["mean"]))
    return {
        "effect": float(t["mean"]),
        "low": float(t["low"]),
        "high": float(t["high"]),
        "p": t["p"],
        "p_against": stats.p_below(values, claim, groups),
        "per_seed": each.tolist(),
        "power": stats.t_power(claim, std, len(each), images) if claim else None,
        "needed": (stats.seeds_needed(effect, std, images=images) or "over 100")
        if effect
        else None,
    }


def of_variance(pairs):
    """Variance of Top-1 over seeds against the baseline's, by F; few seeds are reported, and decide
    nothing.

    power: chance that n seeds see half the variance; needed: seeds that see the one found in four
    of five studies.
    """
    n, values = (
        len(pairs),
        [[row["metrics"]["top1"] for row in rows] for rows in zip(*pairs, strict=True)],
    )
    if not values or (none := next((v for v in values if not stats.enough(v)), None)):
        return no_interval([]) if not values else {"notes": [stats.why_none(none)]}
    f, few = stats.variance_ratio(*values), n < TEN
    enough = (k for k in range(TEN, 201) if stats.f_power(f["ratio"], k) >= 0.8)
    return {
        "effect": 100 * (1 - f["ratio"]),
        "low": 100 * (1 - f["high"]),
        "high": 100 * (1 - f["low"]),
        "p": 1.0 if few else f["p"],
        "p_against": 1.0 if few else f["p_higher"] / 2,
        "needed": next(enough, "over 200") if f["ratio"] < 1 else None,
        "power": stats.f_power(0.5, n),
        "notes": [f"variances need {TEN} seeds, there are {n}"] if few else [],
    }


def epochs_to(row, threshold):
    """Epochs until the run's linear Top-1 first crossed the threshold, interpolated; None: not
    within the run.
    """
    return metrics.first_crossing(row["curve"]["epoch"], row["curve"]["linear"], threshold)


def saved_epochs(pairs, threshold):
    """-> percent of the epochs saved by pair, how many (runs, baselines) never reached the
    threshold, how many tie.

    A run that did not reach it counts with its last epoch: a bound, which `of_epochs` lets decide
    only what it can. Two runs that reach it in the same instant are one run up to there. None: the
    untrained encoder has it already.
    """
    saved, same, never = [], 0, [0, 0]
    for pair in pairs:
        reached = [epochs_to(row, threshold) for row in pair]
        never = [n + (e is None) for n, e in zip(never, reached, strict=True)]
        same += reached[0] is not None and reached[0] == reached[1]
        arm, base = (
            r["curve"]["epoch"][-1] if e is None else e for r, e in zip(pair, reached, strict=True)
        )
        saved.append(100 * (1 - arm / base) if arm and base else None)
    return None if None in saved else saved, never, same


def of_logarithms(saved, claim):
    """of_differences of the logarithms of epochs: a mean of ratios leans against the arm where the
    baseline's vary.
    """
    result = of_differences(
        [-100 * np.log1p(-s / 100) for s in saved], -100 * np.log1p(-claim / 100)
    )
    back = {
        k: float(-100 * np.expm1(-result[k] / 100))
        for k in ("effect", "low", "high")
        if result.get(k) is not None
    }
    return result | back | {"per_seed": [float(s) for s in saved]}


def of_epochs(pairs, threshold, claim, logarithms=False):
    if threshold is None:
        return {"notes": ["no pilot, so no threshold"]}
    saved, (late, base_late), same = saved_epochs(pairs, threshold)
    if saved is None:
        return {"notes": [f"the untrained encoder has the threshold of {threshold:.1f} % already"]}
    result = (of_logarithms if logarithms else of_differences)(saved, claim)
    notes = result.get("notes", [])
    if same:
        notes.append(
            f"{same} of {len(pairs)} pairs are the same run up to the threshold: it comes before any guidance"
        )
    if late or base_late:
        bound = "open" if late and base_late else "at most this" if late else "at least this"
        notes.append(
            f"{late} runs and {base_late} baselines of {len(pairs)} pairs never reached {threshold:.1f} %: "
            f"the saving is {bound}"
        )
    if notes:
        result |= {"power": None, "needed": None}
    if result.get("p") is not None:
        result |= ({"p": 1.0} if same or late else {}) | (
            {"p_against": 1.0} if same or base_late else {}
        )
    return result | {"notes": notes}


def checks(test, plan, rows):
    """Two other ways to count the epochs of a test, which no plan has -> [line], none where it has
    no effect.

    A mean of ratios leans against the arm if the baseline's epochs vary; and one pilot may be a
    lucky seed.
    """
    pairs, threshold = pair_up(test, rows), plan["thresholds"].get(test["against"])
    planned = None if not pairs or threshold is None else saved_epochs(pairs, threshold)[0]
    logs = of_logarithms(planned, 0.0) if planned else {}
    if "low" not in logs:
        return []
    lines = ["by logarithms of the epochs {effect:+.1f} ({low:+.1f} to {high:+.1f})".format(**logs)]
    curves = [base["curve"]["linear"] for _, base in pairs]
    own = float(np.mean([metrics.threshold_of(c) for c in curves]))
    saved, never, _ = saved_epochs(pairs, own)
    if saved is not None and (t := stats.paired_t(saved)):
        bound = "; {} runs and {} baselines never reach it".format(*never) if any(never) else ""
        lines.append(
            f"with {own:.1f} %, the threshold that these {len(pairs)} baselines would have given instead of "
            f"the pilot, {t['mean']:+.1f} ({t['low']:+.1f} to {t['high']:+.1f}{bound})"
        )
    return lines


# ---- verdicts ------------------------------------------------------------------------------------


def holds(test):
    """Is this as claimed? Holm's correction comes afterwards, for the hypothesis."""
    above = test["p"] is not None and test["low"] > 0 and test["effect"] >= test["claim"]
    return (
        above and test["p"] < 0.05 and (test["bootstrap"] is None or test["bootstrap"]["low"] > 0)
    )


def whole(test):
    """Are all planned seeds there? Else it decides nothing."""
    return test["n"] == test["planned"]


def p_of(test):
    """For Holm: two-sided p of a test that has one, points the right way, and is whole; else 1."""
    return test["p"] if test["p"] is not None and whole(test) and test["effect"] > 0 else 1.0


def judge(hypotheses, family):
    """Hypotheses with measured tests -> each with p, holm_p and its verdict: supported, refuted or
    undecided.

    family {id: number of tests}: all that were ever planned; a hypothesis without rows counts with
    p = 1.
    """
    p = {h["id"]: max(map(p_of, h["parts"])) for h in hypotheses}
    holm_p = dict(zip(family, stats.holm([p.get(name, 1.0) for name in family]), strict=True))
    tests = [test for h in hypotheses for test in h["parts"]]
    against = [
        test["p_against"] if test["p"] is not None and whole(test) else 1.0 for test in tests
    ]
    against += [1.0] * (sum(family.values()) - len(tests))
    for test, x in zip(tests, stats.holm(against), strict=False):
        test["holm_against"] = None if test["p"] is None else x
    judged = []
    for h in hypotheses:
        word, because = verdict(h["parts"], holm_p[h["id"]])
        judged.append(
            h | {"p": p[h["id"]], "holm_p": holm_p[h["id"]], "verdict": word, "because": because}
        )
    return judged


def verdict(tests, holm_p):
    """-> the verdict on a hypothesis, and one line that says what decided, or what is missing."""
    if missing := [t for t in tests if not whole(t)]:
        there = f"{missing[0]['n']} of {missing[0]['planned']} planned seeds are there"
        return "undecided", "; ".join([there, *(line(t) for t in tests if t["effect"] is not None)])
    worst = min(tests, key=lambda t: 1.0 if t["holm_against"] is None else t["holm_against"])
    if worst["p"] is not None and (p := worst["holm_against"]) < 0.05:
        return (
            "refuted",
            f"{line(worst)}: an effect of {worst['claim']:g} or more is excluded (p = {p:.3g})",
        )
    if open_tests := [t for t in tests if not holds(t)]:
        return "undecided", "; ".join(map(line, open_tests))
    if holm_p < 0.05:
        return "supported", f"every part holds, and p = {holm_p:.3g} after Holm"
    return "undecided", f"p = {holm_p:.3g} after Holm over the family"


def line(test):
    """ "attn_high against random: +0.52 points of Top-1 (-0.10 to +1.14, n = 5); ..." """
    name, found = f"{test['arm']} against {test['against']}:", []
    if test["low"] is not None:
        found = ["{effect:+.2f} {unit} ({low:+.2f} to {high:+.2f}, n = {n})".format(**test)]
    elif test["effect"] is not None:
        found = ["{effect:+.2f} {unit}".format(**test)]
    return f"{name} {'; '.join(found + test['notes'])}"


# ---- tables --------------------------------------------------------------------------------------


def with_interval(values):
    """-> mean_std, and "half" of the 95 % t interval over seeds; None where they allow none."""
    t = stats.paired_t(values)
    return mean_std(values) | {"half": t and t["high"] - t["mean"]}


def summary(plan, rows, groups):
    """-> [one dict for each arm that has rows]: Top-1, in the run, epochs, minutes, difference to
    its baseline.

    "linear" is that of the run, at its end: best per epoch; "linear_then" when the fastest arm was
    through: best per minute.
    """
    done = {arm: list(seeds.values()) for arm, seeds in rows.items() if seeds}
    then = min(
        (np.mean([r["curve"]["seconds"][-1] for r in runs]) for runs in done.values()), default=None
    )
    table, thresholds = [], plan["thresholds"]
    for arm, runs in done.items():
        base, curves = plan["arms"][arm], [r["curve"] for r in runs]
        limit = thresholds.get(base) or next(
            iter(thresholds.values()), None
        )  # else the first pilot's
        reached = [e for r in runs if limit and (e := epochs_to(r, limit)) is not None]
        row = {
            "arm": arm,
            "against": base,
            "n": len(runs),
            "reached": len(reached),
            "then": float(then / 60),
            "linear_then": with_interval(
                [float(np.interp(then, c["seconds"], c["linear"])) for c in curves]
            ),
            "epochs": with_interval(reached) if reached else None,
            "minutes": with_interval([c["seconds"][-1] / 60 for c in curves]),
            "linear": with_interval([c["linear"][-1] for c in curves]),
        }
        for key, name in DIFFERENCES.items():
            if all(key in r["metrics"] for r in runs):
                row[key] = with_interval([r["metrics"][key] for r in runs])
                if arm != base:
                    row[name] = measure(plans.test(key, arm, base, 0.0), plan, rows, groups)
        table.append(row)
    for name in DIFFERENCES.values():
        stats.add_holm([row[name] for row in table if name in row])
    return table
