"""From rows to numbers and verdicts: pure functions. A row is one run, as experiments/study.py writes it.

rows: {arm: {seed: row}}; plan: PLAN.json; groups (n,): the illustration of each image of the reported split.
A hypothesis is a list of parts, plans.py: what is compared, an arm, against which, and the claim. TEST there says
when it is supported or refuted.
"""

import numpy as np

from common import compare, metrics, stats
from experiments import plans

UNITS = {"top1": "points of Top-1", "cutout": "points under Cutout .3", "finetuned": "points fine-tuned",
         "epochs": "% of the epochs saved", "variance": "% less variance"}  # fmt: skip
# metrics of a run, and what the difference to the baseline is called in the line of an arm
DIFFERENCES = {"top1": "difference", "cutout": "cutout_difference", "finetuned": "finetuned_difference"}
BITS = {"top1": "logistic", "cutout": "cutout"}  # where each image's right or wrong is kept
TEN = 10  # seeds that a comparison of variances needs: at three, F(2, 2) asks for a ratio of 19


def by_arm(plan, rows):
    """Rows that count for a plan -> {arm: {seed: row}}; runs that diverged are left out."""
    found = {arm: {} for arm in plan["arms"]}
    for row in rows:
        planned = row["arm"] in found and row["seed"] in plan["seeds"]
        if planned and row["key"] == plans.key(plan, row["arm"], row["seed"]) and "error" not in row:
            found[row["arm"]][row["seed"]] = row
    return found


def threshold_of(plan, arm):
    """Linear Top-1 that an arm is to reach in the run: of the pilot of what it is compared with, else the first."""
    known = plan["thresholds"]
    return known.get(plan["arms"].get(arm)) or next(iter(known.values()), None)


def epochs_to(row, threshold):
    """Epochs until the run's linear Top-1 first crossed the threshold, interpolated; None: not within the run."""
    return metrics.first_crossing(row["curve"]["epoch"], row["curve"]["linear"], threshold)


def equal_epochs(pairs, threshold):
    """[(row, row of the baseline)] -> percent of the epochs saved, how many of each never reached it, how many tie.

    Who did not reach it is counted with its last epoch: a bound, which `measure` lets decide only what it can. Two
    runs that reach it in the same instant are one run up to there.
    """
    reached = [[epochs_to(r, threshold) for r in pair] for pair in pairs]
    late = [sum(pair[i] is None for pair in reached) for i in (0, 1)]
    same = sum(arm is not None and arm == base for arm, base in reached)
    ends = [[r["curve"]["epoch"][-1] for r in pair] for pair in pairs]
    full = [[e if e is not None else end for e, end in zip(*both, strict=True)]
            for both in zip(reached, ends, strict=True)]  # fmt: skip
    if any(e == 0 for pair in full for e in pair):  # the untrained encoder has it already
        return None, late, same
    return [100 * (1 - arm / base) for arm, base in full], late, same


def pair_up(part, rows):
    """-> the seeds that both arms of a part have, and their [(row, row of the baseline)]."""
    arm, base = rows.get(part["arm"], {}), rows.get(part["against"], {})
    seeds = sorted(arm.keys() & base.keys())
    return seeds, [(arm[s], base[s]) for s in seeds]


def measure(part, plan, rows, groups):
    """A part of a hypothesis -> itself with n, effect, low, high, p, p_against, bootstrap, power, needed, notes.

    p: of no effect, two-sided; p_against: of an effect as large as the claim, one-sided. Both are 1 where the data
    can't tell: one seed, a threshold that was not reached.
    """
    seeds, pairs = pair_up(part, rows)
    result = part | {"n": len(seeds), "planned": len(plan["seeds"]), "unit": UNITS[part["what"]], "p": 1.0,
                     "p_against": 1.0, "effect": None, "bootstrap": None, "notes": []}  # fmt: skip
    if len(seeds) < 2:
        return result | {"notes": [f"{len(seeds)} pair{'' if len(seeds) == 1 else 's'} of seeds: no interval"]}
    if part["what"] == "variance":
        return result | of_variance(pairs)
    if part["what"] == "epochs":
        return result | of_epochs(part, plan, pairs)
    if part["what"] == "finetuned":
        return result | of_differences([a["metrics"]["finetuned"] - b["metrics"]["finetuned"] for a, b in pairs], part)
    key = BITS[part["what"]]
    right = [[stats.from_bits(row["right"][key], len(groups)) for row in pair] for pair in pairs]
    each = np.array([100.0 * a - 100.0 * b for a, b in right])  # (seeds, images)
    return result | of_differences(each.mean(1), part) | {"bootstrap": stats.bootstrap(each, groups)}


def of_differences(values, part):
    """Paired differences -> interval, p values, and what n seeds can see.

    power: chance that n seeds tell an effect as large as the claim from none, the std being the one found;
    needed: seeds that would in four of five studies (where only "more" is claimed: the effect that was found, if any).
    """
    t, std, claim = stats.paired_t(values), float(np.std(values, ddof=1)), part["claim"]
    effect = claim or max(0.0, float(t["mean"]))
    return {"effect": float(t["mean"]), "low": float(t["low"]), "high": float(t["high"]), "p": float(t["p"]),
            "p_against": float(stats.p_below(values, part["claim"])), "per_seed": [float(v) for v in values],
            "power": stats.t_power(claim, std, len(values)) if claim else None,
            "needed": (stats.seeds_needed(effect, std) or "over 100") if effect else None}  # fmt: skip


def of_epochs(part, plan, pairs):
    threshold = plan["thresholds"].get(part["against"])
    if threshold is None:
        return {"notes": ["no pilot, so no threshold"]}
    saved, (late, base_late), same = equal_epochs(pairs, threshold)
    if saved is None:
        return {"notes": [f"the untrained encoder has the threshold of {threshold:.1f} % already"]}
    result, notes = of_differences(saved, part), []
    if same or late or base_late:
        result |= {"power": None, "needed": None}
    if same:
        notes.append(f"{same} of {len(pairs)} pairs are the same run up to the threshold: it comes before any guidance")
        result |= {"p": 1.0, "p_against": 1.0}
    if late or base_late:
        bound = "open" if late and base_late else "at most this" if late else "at least this"
        notes.append(f"{late} runs and {base_late} baselines of {len(pairs)} pairs never reached {threshold:.1f} %: "
                     f"the saving is {bound}")  # fmt: skip
    if late:
        result["p"] = 1.0
    if base_late:
        result["p_against"] = 1.0
    return result | {"notes": notes}


def checks(part, plan, rows):
    """Two other ways to count the epochs of a part, which no plan asked for -> [line], none where it has no effect.

    A mean of ratios leans against the arm if the baseline's epochs vary; and one pilot may be a lucky seed.
    """
    seeds, pairs = pair_up(part, rows)
    threshold, curves = plan["thresholds"].get(part["against"]), [base["curve"]["linear"] for _, base in pairs]
    planned = None if len(seeds) < 2 or threshold is None else equal_epochs(pairs, threshold)[0]
    if planned is None:
        return []
    logs = stats.paired_t([np.log(1 - s / 100) for s in planned])
    mean, low, high = (100 * (1 - np.exp(logs[k])) for k in ("mean", "high", "low"))
    lines = [f"by logarithms of the epochs {mean:+.1f} ({low:+.1f} to {high:+.1f})"]
    own = float(np.mean([c[0] + 0.9 * (c[-1] - c[0]) for c in curves]))
    saved, (late, base_late), _ = equal_epochs(pairs, own)
    if saved is not None:
        t, never = stats.paired_t(saved), f"; {late} runs and {base_late} baselines never reach it"
        lines.append(f"with {own:.1f} %, the threshold that these {len(pairs)} baselines would have given instead of "
                     f"the pilot, {t['mean']:+.1f} ({t['low']:+.1f} to {t['high']:+.1f}"
                     f"{never if late or base_late else ''})")  # fmt: skip
    return lines


def of_variance(pairs):
    """Variance of Top-1 over seeds against the baseline's, by F; few seeds are reported, and decide nothing.

    power: chance that n seeds see half the variance; needed: seeds that see the one found in four of five studies.
    """
    n, values = len(pairs), [[row["metrics"]["top1"] for row in rows] for rows in zip(*pairs, strict=True)]
    f = stats.variance_ratio(*values)
    enough = (k for k in range(TEN, 201) if stats.f_power(f["ratio"], k) >= 0.8)
    needed = next(enough, "over 200") if f["ratio"] < 1 else None
    few, power = n < TEN, stats.f_power(0.5, n)
    return {"effect": 100 * (1 - f["ratio"]), "low": 100 * (1 - f["high"]), "high": 100 * (1 - f["low"]),
            "p": 1.0 if few else f["p"], "p_against": 1.0 if few else f["p_higher"] / 2, "needed": needed,
            "power": power, "notes": [f"variances need {TEN} seeds, there are {n}"] if few else []}  # fmt: skip


# ---- verdicts ------------------------------------------------------------------------------------------------------


def holds(part):
    """Is this part as claimed? Holm is asked afterwards, of the hypothesis."""
    above = part["effect"] is not None and part["low"] > 0 and part["effect"] >= part["claim"]
    return above and part["p"] < 0.05 and (part["bootstrap"] is None or part["bootstrap"]["low"] > 0)


def whole(part):
    """Are all of its planned seeds there? Else it decides nothing."""
    return part["n"] == part["planned"]


def p_of(part):
    """For Holm: two-sided p of a part that points the right way, and is whole; else 1."""
    return part["p"] if whole(part) and (part["effect"] or 0) > 0 else 1.0


def judge(hypotheses, family):
    """Hypotheses with measured parts -> each with p, holm_p and its verdict: supported, refuted or undecided.

    family {id: number of parts}: all that were ever to be tested; who has no rows counts with p = 1.
    """
    p = {h["id"]: max(map(p_of, h["parts"])) for h in hypotheses}
    holm_p = dict(zip(family, stats.holm([p.get(name, 1.0) for name in family]), strict=True))
    parts = [part for h in hypotheses for part in h["parts"]]
    against = [part["p_against"] if whole(part) else 1.0 for part in parts]
    against += [1.0] * (sum(family.values()) - len(parts))
    for part, x in zip(parts, stats.holm(against), strict=False):
        part["holm_against"] = x
    return [h | {"p": p[h["id"]], "holm_p": holm_p[h["id"]]} | verdict(h, holm_p[h["id"]]) for h in hypotheses]


def verdict(hypothesis, holm_p):
    """-> {"verdict", "because"}: one line that says what decided, or what is missing."""
    parts = hypothesis["parts"]
    if missing := [p for p in parts if not whole(p)]:
        there = f"{missing[0]['n']} of {missing[0]['planned']} planned seeds are there"
        return {
            "verdict": "undecided",
            "because": "; ".join([there, *[line(p) for p in parts if p["effect"] is not None]]),
        }
    if refuting := [p for p in parts if p["holm_against"] < 0.05]:
        worst = min(refuting, key=lambda p: p["holm_against"])
        return {"verdict": "refuted", "because": f"{line(worst)}: an effect of {worst['claim']:g} or more is excluded "
                                                 f"(p = {worst['holm_against']:.3g})"}  # fmt: skip
    if all(map(holds, parts)) and holm_p < 0.05:
        return {"verdict": "supported", "because": f"every part holds, and p = {holm_p:.3g} after Holm"}
    open_parts = [p for p in parts if not holds(p)]
    why = "; ".join(map(line, open_parts)) if open_parts else f"p = {holm_p:.3g} after Holm over the family"
    return {"verdict": "undecided", "because": why}


def line(part):
    """ "attn_high against random: +0.52 points of Top-1 (-0.10 to +1.14, n = 5); ..." """
    name = f"{part['arm']} against {part['against']}:"
    if part["effect"] is None:
        return f"{name} {'; '.join(part['notes'])}"
    text = f"{name} {part['effect']:+.2f} {part['unit']} ({part['low']:+.2f} to {part['high']:+.2f}, n = {part['n']})"
    return "; ".join([text, *part["notes"]])


# ---- tables --------------------------------------------------------------------------------------------------------


def spread(values):
    """-> compare.spread's mean, std and n, and "half" of the 95 % t interval; None where one value can't tell."""
    found, n = compare.spread(values), len(values)
    return found | {"half": None if n == 1 else stats.t_quantile(n - 1) * found["std"] / n**0.5}


def summary(plan, rows, groups):
    """-> [one dict for each arm that has rows]: Top-1, in the run, epochs, minutes, difference to its baseline.

    "linear" is that of the run, at its end: best per epoch; "linear_then" when the fastest arm was through: best per
    minute.
    """
    done = {arm: list(seeds.values()) for arm, seeds in rows.items() if seeds}
    if not done:
        return []
    then = min(np.mean([r["curve"]["seconds"][-1] for r in arm]) for arm in done.values())
    table = []
    for arm, own in done.items():
        limit = threshold_of(plan, arm)
        reached = [e for r in own if limit and (e := epochs_to(r, limit)) is not None]
        at = [float(np.interp(then, r["curve"]["seconds"], r["curve"]["linear"])) for r in own]
        line = {"arm": arm, "against": plan["arms"][arm], "n": len(own), "linear_then": spread(at),
                "reached": len(reached), "epochs": spread(reached) if reached else None, "then": float(then / 60),
                "minutes": spread([r["curve"]["seconds"][-1] / 60 for r in own])}  # fmt: skip
        line["linear"] = spread([r["curve"]["linear"][-1] for r in own])
        for key, name in DIFFERENCES.items():
            if all(key in r["metrics"] for r in own):
                line[key] = spread([r["metrics"][key] for r in own])
                if arm != line["against"]:
                    part = {"what": key, "arm": arm, "against": line["against"], "claim": 0.0}
                    line[name] = measure(part, plan, rows, groups)
        table.append(line)
    for name in DIFFERENCES.values():
        compared = [x[name] for x in table if name in x]
        for part, p in zip(compared, stats.holm([d["p"] for d in compared]), strict=True):
            part["holm_p"] = p
    return table
