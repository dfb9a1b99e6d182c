"""How fast a training step is, beside transformers' ViTMAE: python -m benchmarks.train [--quick]

Writes runs/bench/bench_train_cpu.csv (or _cuda), .png and .md. Each candidate is a process of its
own; all start with the same weights, get the same images and noise in the same order, and take
turns: a disturbance hits all of them. "memory kept" gives transformers what pretrain.py does about
glibc on a CPU (keep_freed_memory).

A step is: bytes of the views -> what the network takes -> forward, loss, backward, AdamW. The gate
comes first: losses of the warm-up steps against those of transformers in fp32. Where they differ no
speed is reported (--warmup 50 makes curves of 50 steps of it). "whole step" adds what pretrain.py
does besides: crops, weights by detail, clipping, the head for pictures. MFU counts the operations
that the mathematics needs, the same for every candidate (`step_flops`), over those of a plain
matrix product in the same run.
"""

import contextlib
import functools
import multiprocessing
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import mask as masking
from benchmarks import OUT, TRITON, about, step
from benchmarks.step import PHASES, build
from common.checkpoints import save_model
from common.command import (
    Parser,
    at_least,
    between,
    claim,
    cli,
    progress,
    refuse_file,
    refuse_idle,
)
from common.io import UserError, save_text
from common.train import pick_device
from experiments.tables import replace_rows, rows_there
from export import export
from model import SIZES

PAPER, LIGHT = [512, 8], [256, 2]  # decoders, width and depth: the paper's, and ours
CANDIDATES = {
    "AniMask": dict(net="ours", decoder=PAPER),
    "AniMask, compiled": dict(net="ours", decoder=PAPER, compile=True),
    "transformers": dict(net="hf", decoder=PAPER, keep=False),
    "transformers, memory kept": dict(net="hf", decoder=PAPER),
    "transformers, memory kept, eager attention": dict(net="hf", decoder=PAPER, attention="eager"),
    "transformers, memory kept, compiled": dict(net="hf", decoder=PAPER, compile=True),
    "transformers, plain AdamW": dict(
        net="hf", decoder=PAPER, keep=False, fused=False
    ),  # as it comes
    "AniMask, light": dict(net="ours", decoder=LIGHT),
    "AniMask, light, whole step": dict(net="ours", decoder=LIGHT, whole=True),
    "AniMask, light, compiled": dict(net="ours", decoder=LIGHT, compile=True),
    "transformers, memory kept, light": dict(net="hf", decoder=LIGHT),
}
QUICK = (
    "AniMask",
    "transformers, memory kept",
    "AniMask, light",
    "transformers, memory kept, light",
)
KEYS = (
    "candidate",
    "model",
    "image_size",
    "batch",
    "dtype",
    "device",
    "decoder",
)  # of a row: the same again replaces
# Relative difference of losses. fp32: each of the ~100 roundings from pixel to loss is 2^-24, in
# sum well under 1e-5; later steps inherit it through AdamW. bf16: 2^-9 each, about sqrt(100) * 2^-9
# = 2 % of a prediction.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


# ---- counted, not measured -----------------------------------------------------------------------


def step_flops(model, K):
    """Matrix operations of forward and backward of our MAE for one image, K patches visible, as
    torch counts them.

    A multiplication and an addition are 2 operations. The model is on the device "meta": only
    shapes are computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        ids = torch.arange(model.encoder.side**2)[None]
        patches = torch.empty(1, K, 3 * model.encoder.patch_size**2)
    with FlopCounterMode(display=False) as counter:
        pred, stats, _ = model(patches, ids[:, :K], ids[:, K:])
        (pred.sum() + stats.sum()).backward()
    return counter.get_total_flops()


def on_paper(speed, batch, gradient_bytes, ranks=8, link=300e9, memory=3e12):
    """Images a second of `ranks` GPUs, each with this batch, from the speed of one; messages hide
    behind nothing.

    A ring all-reduce moves 2 (R-1)/R times the gradient over each link (B/s; NVLink 4 has 450e9
    each way); to pack and unpack it reads and writes it twice (memory, B/s). What each GPU does
    itself stays the same.
    """
    message = 2 * (ranks - 1) / ranks * gradient_bytes / link + 4 * gradient_bytes / memory
    return ranks * batch / (batch / speed + message)


def agree(losses, reference, dtype):
    """-> "" if the losses are those of the reference, else a line that says where they part."""
    if len(losses) != len(reference) or not losses:
        return f"{len(losses)} losses against {len(reference)}"
    for i, (x, y) in enumerate(zip(losses, reference, strict=True)):
        if not abs(x - y) <= TOLERANCE[dtype] * abs(y):
            return f"step {i + 1}: a loss of {x:.6f} against {y:.6f}"
    return ""


# ---- candidates, each a process ------------------------------------------------------------------


def ask(candidate, name, *request):
    """A candidate is (its process, our end of the pipe) -> its answer to the request, or what it
    says unasked.
    """
    process, pipe = candidate
    try:
        if request:
            pipe.send(request)
        return pipe.recv()
    except (EOFError, OSError):
        process.join()
        raise UserError(
            f"{name} ended with status {process.exitcode}; its message is above"
        ) from None


def started(stack, case, name):
    """A candidate that ends with the stack, and what it said after its warm-up."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=cli, args=(functools.partial(step.serve, case, theirs),))
    process.start()
    theirs.close()
    stack.callback(process.join)
    stack.callback(ours.close)  # nobody asks any more: it ends
    return (process, ours), ask((process, ours), name)


def gated(stack, case, names, folder):
    """Start all candidates -> {name: candidate}; a UserError, and so no speed, where losses part or
    a step waits.

    Those with one decoder begin with the same weights: folder/WxD.safetensors, and WxD-hf for
    transformers.
    """
    running, reference = {}, {}
    for name in names:
        own = case | CANDIDATES[name]
        stem = own["weights"] = str(Path(folder) / f"{own['decoder'][0]}x{own['decoder'][1]}")
        if stem not in reference:
            torch.manual_seed(0)
            save_model(build(own), f"{stem}.safetensors", {"step": 0, "run": {}, "norm_pix": True})
            export(f"{stem}.safetensors", "hf", Path(f"{stem}-hf"))
            with contextlib.ExitStack() as short:
                plain = case | {
                    "net": "hf",
                    "decoder": own["decoder"],
                    "weights": stem,
                    "dtype": "fp32",
                }
                reference[stem] = started(short, plain, "transformers in fp32")[1]["losses"]
        running[name], first = started(stack, own, name)
        problem = "" if own.get("whole") else agree(first["losses"], reference[stem], case["dtype"])
        if problem or first["waits"]:
            raise UserError(
                f"{name}, {case['dtype']}: {problem or first['waits']}; no speed is reported"
            )
        print(
            f"gate     {case['dtype']} {name}: {'not compared' if own.get('whole') else 'losses agree'}",
            flush=True,
        )
    return running


# ---- rows ----------------------------------------------------------------------------------------


def measure(case, names, repeats, steps):
    """One dtype: the gate, then all candidates in turns, and the phases of a whole step -> rows."""
    product = case | {"net": "matmul", "side": 8192 if case["device"] == "cuda" else 2048}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        running = gated(stack, case, names, folder)
        running["matmul"], _ = started(stack, product, "matmul")
        answers = {name: [] for name in running}
        for _ in progress(range(repeats), f"turns, {case['dtype']}", leave=False):
            for name, candidate in running.items():
                answers[name].append(ask(candidate, name, "steps", steps))
        whole = [name for name in names if CANDIDATES[name].get("whole")]
        phases = {name: ask(running[name], name, "phases", 2 * steps) for name in whole}
    seconds = {name: [a["seconds"] for a in own] for name, own in answers.items()}
    tflops = 2 * product["side"] ** 3 * steps / statistics.median(seconds["matmul"]) / 1e12
    rows = []
    for name in names:
        speeds = [steps * case["batch"] / s for s in seconds[name]]
        peak_mb = max(a["peak_mb"] for a in answers[name])
        rows.append(row_of(case, name, speeds, peak_mb, tflops, phases.get(name, {})))
    return [row | against_the_peer(row, rows) for row in rows]


def row_of(case, name, speeds, peak_mb, tflops, phases):
    """A row of results without what compares it to others; speeds: images a second of each repeat;
    phases: their ms.
    """
    (width, blocks), speed = CANDIDATES[name]["decoder"], statistics.median(speeds)
    with torch.device("meta"):
        model = build(case | CANDIDATES[name])
    gradient = 4 * sum(w.numel() for w in model.parameters())
    flops = step_flops(model, masking.kept(model.encoder.side**2, case["ratio"]))
    same = {k: case[k] for k in ("model", "image_size", "batch", "dtype", "device")}
    return {
        "candidate": name,
        **same,
        "decoder": f"{width}x{blocks}",
        "images_per_s": round(speed, 2),
        "low": round(min(speeds), 2),
        "high": round(max(speeds), 2),
        "repeats": len(speeds),
        "peak_mb": round(peak_mb),
        "gflop_per_image": round(flops / 1e9, 2),
        "matmul_tflop_per_s": round(tflops, 3),
        "mfu_percent": round(speed * flops / tflops / 1e10, 1),
        "gradient_mb": round(gradient / 1e6, 1),
        "on_8_gpus_on_paper": round(on_paper(speed, case["batch"], gradient))
        if case["device"] == "cuda"
        else "",
        "over_transformers": None,
        **{f"{phase}_ms": phases.get(phase) for phase in PHASES},
    }


def against_the_peer(row, rows):
    """-> {"over_transformers"}: how many times as fast as its best candidate with this decoder and
    dtype.
    """
    peers = [
        r["images_per_s"]
        for r in rows
        if r["decoder"] == row["decoder"] and r["candidate"].startswith("transf")
    ]
    return {"over_transformers": round(row["images_per_s"] / max(peers), 3) if peers else None}


# ---- what is written -----------------------------------------------------------------------------


def table(rows):
    """Rows as a Markdown table."""
    head = "| step | dtype | decoder | images/s (range) | over transformers | peak MB | MFU |\n"
    return (
        head
        + "|---" * 7
        + "|\n"
        + "".join(
            f"| {r['candidate']} | {r['dtype']} | {r['decoder']} | {r['images_per_s']} ({r['low']} to {r['high']}) | "
            f"{r['over_transformers'] or '-'} | {r['peak_mb']} | {r['mfu_percent']} % |\n"
            for r in rows
        )
    )


def draw(rows, path):
    """Images a second of every candidate, a panel for each dtype, and where the time of a whole
    step goes.
    """
    from common import plots

    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    whole = [r for r in rows if r["data_ms"] is not None]
    n = len(dtypes) + bool(whole)
    title = (
        f"{rows[0]['model']}, {rows[0]['image_size']} px, batch {rows[0]['batch']}: a training step"
    )
    with plots.panels(
        path, title, 1, n, (3.7 * n, 1.2 + 0.32 * len(rows) / len(dtypes)), squeeze=False
    ) as axes:
        for axis, dtype in zip(axes[0], dtypes, strict=False):
            own = [r for r in rows if r["dtype"] == dtype][::-1]
            speed, low, high = ([r[key] for r in own] for key in ("images_per_s", "low", "high"))
            error = np.abs(np.array([low, high]) - speed)
            colours = [
                plots.ORANGE if r["candidate"].startswith("transf") else plots.BLUE for r in own
            ]
            axis.barh(
                range(len(own)), speed, xerr=error, color=colours, ecolor=plots.INK, capsize=2
            )
            names = [f"{r['candidate']}, {r['decoder']}" for r in own] if dtype == dtypes[0] else []
            axis.set_yticks(range(len(own)), names)
            axis.set(title=dtype, xlabel="images a second")
        if whole:
            split_panel(
                axes[0, -1], whole[::-1], (plots.INK, plots.PINK, *plots.COLOURS[:3], "#999999")
            )


def split_panel(axis, whole, colours):
    """A bar for each dtype: which share of a whole step each phase takes."""
    left = [0.0] * len(whole)
    for phase, colour in zip(PHASES, colours, strict=True):
        share = [100 * row[f"{phase}_ms"] / sum(row[f"{p}_ms"] for p in PHASES) for row in whole]
        axis.barh(range(len(whole)), share, left=left, color=colour, label=phase)
        left = [a + b for a, b in zip(left, share, strict=True)]
    axis.set_yticks(range(len(whole)), [row["dtype"] for row in whole])
    axis.set(title="A whole step, light decoder", xlabel="share of the time, %", xlim=(0, 100))
    axis.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.12))


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--model", default="small", choices=SIZES)
    add("--image-size", type=at_least(1), default=224, metavar="PX")
    add("--patch-size", type=at_least(1), default=16, metavar="PX")
    add("--batch", type=at_least(1), metavar="B", help="images a step (default: 16, on a GPU 256)")
    add("--ratio", type=between(0.01, 0.99), default=0.75, help="share of patches hidden")
    add("--dtype", nargs="+", default=["fp32", "bf16"], choices=TOLERANCE)
    add("--only", nargs="+", metavar="NAME", help="candidates (default: all)")
    add("--repeats", type=at_least(1), default=5, help="how often each has its turn")
    add("--steps", type=at_least(1), help="steps of a turn (default: 3, on a GPU 30)")
    add(
        "--warmup",
        type=at_least(1),
        help="steps before, whose losses are the gate (default: 3, on a GPU 20)",
    )
    add("--quick", action="store_true", help="eager candidates only, 3 turns")
    add(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder of the CSV, where these candidates' rows are "
        "replaced, the plot and the table of this call\n(default: runs/bench)",
    )
    args = parser.parse_args()
    if args.quick:
        refuse_idle(args.given & {"repeats"}, "with --quick, which takes 3 turns")
    device = pick_device(args.device)
    path = args.out / f"bench_train_{device.type}.csv"
    refuse_file(args.out)
    rows_there(path, KEYS)
    claim([path.with_suffix(suffix) for suffix in (".md", ".png")])
    batch, steps, warmup = (256, 30, 20) if device.type == "cuda" else (16, 3, 3)
    names = args.only or (QUICK if args.quick else list(CANDIDATES))
    if unknown := set(names) - CANDIDATES.keys():
        raise UserError(
            f"--only {', '.join(unknown)} is no candidate; there are: {'; '.join(CANDIDATES)}"
        )
    case = {k: vars(args)[k] for k in ("model", "image_size", "patch_size", "ratio")}
    case |= {"device": device.type, "batch": args.batch or batch, "warmup": args.warmup or warmup}
    where, rows = (
        about(device, versions=f"transformers {version('transformers')}, triton {TRITON}"),
        [],
    )
    for dtype in args.dtype:
        found = measure(
            case | {"dtype": dtype}, names, 3 if args.quick else args.repeats, args.steps or steps
        )
        rows += [row | where for row in found]
        print(table(found), flush=True)
    replace_rows(path, rows, KEYS)
    save_text(f"{table(rows)}\n{', '.join(where.values())}\n", path.with_suffix(".md"))
    draw(rows, path.with_suffix(".png"))
    print(f"wrote    {path}, .md and .png")


if __name__ == "__main__":
    cli(main)
