"""The questions of the study, as plain data: arms, hypotheses, claims. study.py runs it, verdicts.py judges it.

An arm is a mask, and after it any other flags of pretrain.py: "random", "attn_high:beta=2
--attention outlier". What stands in braces is made before the first run: {pilot}, a run with random
masks and a seed that is never reported; {coarse}, {parts}, maps by maps.py (the last
with the pilot's encoder); {dino} is the file of --dino.
"""

import hashlib
import json

from common.io import UserError

QUESTIONS = {
    "h1": "Does hiding what a teacher looks at teach more, and sooner, than hiding at random?",
    "look": "The same, by a teacher that was taught to look: does it teach more now?",
    "h2": "Does hiding the background first make training steadier and faster, hiding the foreground first better?",
    "h3": "Does going from a portion of each part to whole parts teach sooner, and more robustly?",
    "ablations": "Which factor of the recipe matters, and how much?",
    "finetune": "Does it still help when the whole encoder is trained afterwards?",
    "tune": "Which recipe is best on dev, with as many trials for random masks as for guided ones?",
    "first": "The README's first command against the same with random masks: as many steps of as many views.",
    "arms": "How do these masks compare?",
}
FAMILY = {
    "H1": 4,
    "H2a at .75": 2,
    "H2b at .75": 2,
    "H2a at .5": 2,
    "H2b at .5": 2,
    "H3": 3,
}  # and their tests
LOOK = {"H1 again on faces20": 4, "H1 again on toon": 4}  # one family for both sets
TEST = (
    "Differences between paired seeds with a 95 % t interval; of shares of images also a bootstrap over seeds and "
    "illustrations. Supported: each part of the hypothesis has its intervals above 0 and its estimate at least at the "
    "claim, and Holm over the family leaves p < .05, p being the largest of its parts (intersection-union test). "
    "Refuted: for one part a true effect as large as the claim has p < .05, one-sided, after Holm over all parts of "
    "the family. Variances: F test, from ten seeds on. All else is undecided, and so is what lacks a planned run."
)


def with_parameter(arm, pair):
    """ "attn_high --teacher x", "shuffle=1" -> "attn_high:shuffle=1 --teacher x"."""
    mask, *rest = arm.split(" ", 1)
    return " ".join([f"{mask}{',' if ':' in mask else ':'}{pair}", *rest])


def test(what, arm, against, claim):
    """what: top1, cutout, finetuned (points), epochs (percent fewer to the threshold; log_epochs: their geometric
    mean), variance (percent less)."""
    return {"what": what, "arm": arm, "against": against, "claim": claim}


def hypothesis(name, claim, *tests):
    return {"id": name, "claim": claim, "parts": [test(*words) for words in tests]}


def h1(guided, **_):
    shuffled = with_parameter(guided, "shuffle=1")
    claim = (
        "at least 1 point of Top-1 more than random and 10 % fewer epochs; "
        "better than its shuffled control and green"
    )
    return {
        "arms": dict.fromkeys(["random", guided, shuffled, "green"], "random"),
        "hypotheses": [
            hypothesis(
                "H1",
                f"{guided}: {claim}",
                ("top1", guided, "random", 1.0),
                ("epochs", guided, "random", 10.0),
                ("top1", guided, shuffled, 0.0),
                ("top1", guided, "green", 0.0),
            )
        ],
    }


def look(guided, fg, data, **_):
    """The second verdict on H1: a second loss in every arm, by --recipe; three pilots, epochs by
    logarithms.

    Compared beside it: a hint, and the figure itself.
    """
    shuffled = with_parameter(guided, "shuffle=1")
    arms = [
        "random",
        guided,
        f"attn_hint{guided[len('attn_high') :]}",
        shuffled,
        "green",
        f"fg_heavy --maps {fg}",
    ]
    claim = "what H1 claims of attn_high, on the headline of today"
    tests = [
        ("top1", guided, "random", 1.0),
        ("log_epochs", guided, "random", 10.0),
        ("top1", guided, shuffled, 0.0),
        ("top1", guided, "green", 0.0),
    ]
    return {
        "arms": dict.fromkeys(arms, "random"),
        "pool": "extremes",
        "pilots": 3,
        "hypotheses": [hypothesis(f"H1 again on {data}", f"{guided}: {claim}", *tests)],
    }


def h2(fg, **_):
    arms, hypotheses = {}, []
    for ratio, flag in ((".75", ""), (".5", " --ratio .5")):
        base, bg_first, fg_first = (
            f"random{flag}",
            f"bg_heavy --maps {fg}{flag}",
            f"fg_heavy --maps {fg}{flag}",
        )
        control = with_parameter(fg_first, "shuffle=1")
        arms |= dict.fromkeys([base, bg_first, fg_first, control], base)
        hypotheses += [
            hypothesis(
                f"H2a at {ratio}",
                "bg_heavy: Top-1 varies less over seeds than random, in fewer epochs",
                ("variance", bg_first, base, 0.0),
                ("epochs", bg_first, base, 0.0),
            ),
            hypothesis(
                f"H2b at {ratio}",
                "fg_heavy: half a point of Top-1 more than random; more than shuffled",
                ("top1", fg_first, base, 0.5),
                ("top1", fg_first, control, 0.0),
            ),
        ]
    return {"arms": arms, "hypotheses": hypotheses}


def h3(parts, **_):
    arm = f"parts --maps {parts}"
    shuffled = with_parameter(arm, "shuffle=1")
    claim = "parts: 15 % fewer epochs than random, 1 point more under Cutout of .3, there also more than shuffled"
    return {
        "arms": dict.fromkeys(["random", arm, shuffled], "random"),
        "stages": ["stress"],
        "hypotheses": [
            hypothesis(
                "H3",
                claim,
                ("epochs", arm, "random", 15.0),
                ("cutout", arm, "random", 1.0),
                ("cutout", arm, shuffled, 0.0),
            )
        ],
    }


def levels(arm, flag, values, recipe):
    """{value: the arm with this flag}; what the recipe has anyway needs no flag, so that its run is
    shared.
    """
    default = (
        f"{float(recipe):g}" if str(recipe).replace(".", "", 1).isdigit() else recipe
    )  # ratio: also a schedule
    return {v: arm if f"{float(v):g}" == default else f"{arm} {flag} {v}" for v in values}


def ablations(guided, fg, parts, dino, strategies, ratio, depth, **_):
    """panels {factor: {line: {level: arm}}}: one factor at a time around random and guided masks.

    ratio, depth (of the decoder): those of the recipe.
    """
    both = {"random": "random", guided: guided}
    panels = {
        "ratio": {n: levels(a, "--ratio", (".5", ".75", ".9"), ratio) for n, a in both.items()},
        "decoder depth": {
            n: {
                d: a if d == depth else f"{a} --model nano:decoder_depth={d}"
                for d in ("1", "2", "4")
            }
            for n, a in both.items()
        },
        "teacher": {
            guided: {"self": guided, "MAE": f"{guided} --teacher {{pilot}}"}
            | ({"DINO": f"{guided} --teacher {{dino}}"} if dino else {})
        },
        "schedule of parts": {
            "parts": {
                name: f"parts{params} --maps {parts}"
                for name, params in (
                    ("power 1", ":power=1"),
                    ("power 2", ""),
                    ("power 4", ":power=4"),
                    ("easy", ":whole=0"),
                    ("hard", ":whole=1"),
                )
            }
        },
        "weight of flat patches": {
            n: levels(a, "--flat-weight", (".1", ".3", "1"), 1)
            for n, a in (("normalised", "random"), ("raw pixels", "random --no-norm-pix"))
        },
    }
    maps = {"fg_heavy": f" --maps {fg}", "bg_heavy": f" --maps {fg}", "parts": f" --maps {parts}"}
    named = {s: s + maps.get(s, "") for s in strategies} | {guided.split(" ")[0]: guided}
    panels["mask"] = {"every strategy": named}
    arms = {
        arm: "random"
        for lines in panels.values()
        for levels in lines.values()
        for arm in levels.values()
    }
    return {"arms": {"random": "random"} | arms, "panels": panels}


def finetune(guided, **_):
    shuffled = with_parameter(guided, "shuffle=1")
    return {"arms": dict.fromkeys(["random", guided, shuffled], "random"), "stages": ["finetune"]}


def tune(guided, blr, epochs, **_):
    """As many trials for random as for guided masks: five that both can have, and five of its own
    for each.
    """
    shared = ["", f"--blr {blr * 2:g}", "--no-norm-pix", "--min-crop 0.7", f"--epochs {epochs * 2}"]
    own = [
        f"--blr {blr / 2:g}",
        "--min-crop 0.2",
        "--ratio 0.6",
        "--flat-weight 0.1",
        "--model nano:decoder_depth=2",
    ]
    plain = [f"random {flags}".strip() for flags in shared + own]
    tuned = [f"{guided} {flags}".strip() for flags in shared]
    tuned += [
        with_parameter(guided, pair) for pair in ("beta=0.5", "beta=2", "start=0.3,ramp_for=0.3")
    ]
    tuned += ["attn_hint" + guided[len("attn_high") :], f"{guided} --attention cls"]
    return {"arms": dict.fromkeys(plain, "random") | dict.fromkeys(tuned, guided)}


def first(guided, **_):
    """The README's first command under five masks: pretrain.py's own recipe, which is one for all."""
    arms = ["random", guided, with_parameter(guided, "shuffle=1"), "fg_heavy", "green"]
    return {
        "arms": dict.fromkeys(arms, "random"),
        "pool": "extremes",
        "flags": "--flat-weight 0.1 --contrast pooler",
    }


def named(**_):
    return {"arms": {"random": "random"}}  # --arms adds the rest


MAKE = {
    "h1": h1,
    "look": look,
    "h2": h2,
    "h3": h3,
    "ablations": ablations,
    "finetune": finetune,
    "tune": tune,
    "first": first,
    "arms": named,
}
ALL = ("h1", "h2", "h3", "ablations")


def key(plan, arm, seed):
    """What tells a run from every other, whatever machine or folder it is made in: 10 hex digits."""
    identity = [plan["data_digest"], plan["split"], plan["recipe"], arm, seed]
    identity += [plan["dino"]] if "{dino}" in arm else []
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=5).hexdigest()


def make(name, more=(), **settings):
    """A plan, with the further arms of the command line: question, arms {arm: against}, hypotheses,
    panels, stages.
    """
    plan = {"plan": name, "question": QUESTIONS[name], "hypotheses": [], "panels": {}, "stages": []}
    plan |= MAKE[name](**settings)
    return plan | {"arms": plan["arms"] | {a: "random" for a in more if a not in plan["arms"]}}


# ---- adaptation: linear, LoRA, full and from scratch side by side --------------------------------

LEARNING_RATES = {  # the trials of each method: what is swept, and its values
    "linear": ("--head-lr", (1e-2, 3e-2, 1e-1, 3e-1)),
    "lora": ("--lr", (1.5e-3, 3e-3, 6e-3, 1.2e-2)),
    "full": ("--lr", (5e-4, 1e-3, 2e-3, 4e-3)),
    "scratch": ("--lr", (2.5e-4, 5e-4, 1e-3, 2e-3)),
}
# every method gets the same number of trials, judged on dev; then each method's best, reported on
# val
PHASES = {
    "rates": "learning rates, on dev",
    "first": "seed 0",
    "rank": "ranks of LoRA beside its 8",
    "margin": "heads and margins of LoRA",
    "seeds": "seeds 1 and 2",
}
HEADS = (
    ("arcface", 0.1),
    ("arcface", 0.3),
    ("arcface", 0.5),
    ("cosface", 0.35),
    ("curricularface", 0.5),
    ("ifa", None),
)


def trials(phase, methods, best):
    """-> [(name, method, flags of finetune_lora.py)] of a phase; best {method: [flag, value]},
    found by phase rates.
    """
    if phase == "rates":
        return [
            (f"{m}{v:g}", m, [LEARNING_RATES[m][0], v, "--split", "dev"])
            for m in methods
            for v in LEARNING_RATES[m][1]
        ]
    if missing := set(methods if phase in ("first", "seeds") else ["lora"]) - best.keys():
        raise UserError(
            f"phase {phase} takes the best learning rate of {', '.join(sorted(missing))}, and there is no "
            "row of it: --phases rates comes first"
        )
    if phase == "rank":
        return [
            (f"lora-r{r}", "lora", [*best["lora"], "--method", f"lora:r={r}"]) for r in (4, 16, 32)
        ]
    if phase == "margin":
        words = {(head, m): f"{head}:margin={m}" if m else head for head, m in HEADS}
        return [
            (f"{head}{m or ''}", "lora", [*best["lora"], "--head", words[head, m]])
            for head, m in HEADS
        ]
    seeds = (0,) if phase == "first" else (1, 2)
    return [(f"{m}-s{s}", m, [*best[m], "--seed", s]) for s in seeds for m in methods]


def best_learning_rates(rows):
    """Rows of phase rates -> {method: [flag, value]} with the highest macro-F1 on dev."""
    best = {}
    for row in rows:
        if (
            row["phase"] == "rates"
            and float(row["macro_f1"]) > best.get(row["result"], (0, None))[0]
        ):
            flag = LEARNING_RATES[row["result"]][0]
            best[row["result"]] = (float(row["macro_f1"]), [flag, row[flag[2:].replace("-", "_")]])
    return {method: words for method, (_, words) in best.items()}
