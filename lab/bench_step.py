"""How fast a training step is, beside the ViTMAE of transformers: python -m lab.bench_step

Writes runs/bench/bench_step_cpu.csv (or _cuda), a row for each candidate and its settings in each
turn. The summary compares each candidate under its fastest settings. A row is measured in a process
that ends before the next begins.

A step is: bytes of the views, forward, the loss of MAE, backward, AdamW. Both start with the same
weights, and get the same images and noise. The gate: the losses of the first steps are those of our
eager fp32 step with the PyTorch references. Where they differ, there is no speed.
"""

import functools
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import mask as masking
from apps.export import export
from common import train
from common.checkpoints import init_from, save_network
from common.train import UserError, at_least, cli, refuse_useless
from kernels import patches
from kernels.patches import masked_patch_gather, reconstruction_error, scale_of_patch
from lab import bench
from model import MAE, SIZES

FULL = dict(image_size=224, patch_size=16, ratio=0.75)
TINY = dict(model="nano", image_size=32, patch_size=8, ratio=0.75, batch=4)  # --small
DECODERS = ("512x8", "256x2")  # width x depth: the paper's, and ours
# Steps whose losses are the gate, and steps of a turn.
COUNTS = {"small": (2, 2), "cpu": (3, 3), "cuda": (10, 30)}
FLOOR = 1e-3  # under a patch's std: that of MAE, sqrt(1e-6), so that all do the same
# Relative difference of losses. fp32: each of the ~100 roundings from pixel to loss is 2^-24, in
# sum well under 1e-5; later steps inherit it through AdamW. bf16: 2^-9 each, about sqrt(100) * 2^-9
# = 2 % of a prediction.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class Case:
    """What is measured: a candidate, its settings, and the step that all candidates compute."""

    model: str
    image_size: int
    patch_size: int
    ratio: float
    batch: int
    dtype: str
    decoder: str
    device: str
    candidate: str = "AniMask"
    compile: bool = False
    attention: str = "fused"  # or "eager"

    def network(self):
        """Our MAE of this size."""
        width, depth = map(int, self.decoder.split("x"))
        size = {k: SIZES[self.model][k] for k in ("dim", "depth", "heads")}
        return MAE(width, depth, image_size=self.image_size, patch_size=self.patch_size, **size)

    def settings(self, candidate, small):
        """All settings of a candidate that are tried. Our own attention has no other form."""
        case = replace(self, candidate=candidate)
        found = [case] if small else [case, replace(case, compile=True)]
        if candidate != "AniMask":
            found += [replace(one, attention="eager") for one in found]
        return found


# ---- the gate ------------------------------------------------------------------------------------


def agree(losses, reference, dtype):
    """-> "" if the losses are those of the reference, else a line with both."""
    same = len(losses) == len(reference) > 0
    if same and np.allclose(losses, reference, rtol=TOLERANCE[dtype], atol=0):
        return ""
    return f"losses of {losses}, of the reference {reference}"


# ---- two networks --------------------------------------------------------------------------------


def make_network(case, folder):
    """The candidate's network with the weights that all start with, and what computes its loss."""
    if case.candidate == "transformers":
        from transformers import ViTMAEForPreTraining

        how = {"attn_implementation": "sdpa" if case.attention == "fused" else "eager"}
        net = ViTMAEForPreTraining.from_pretrained(folder / "hf", **how)
        net.config.norm_pix_loss = True
        net.config.mask_ratio = case.ratio
        for name, weight in net.named_parameters():  # positions are fixed in MAE, and learn there
            weight.requires_grad_("position" not in name and "pos_embed" not in name)
        return net, their_loss
    net = case.network()
    init_from(net, folder / "model.safetensors")
    return net, our_loss


def our_loss(case, net, view, noise, autocast):
    """-> the loss of what pretrain.py does with a view, under the loss of the paper."""
    K = masking.kept(noise.shape[1], case.ratio)
    ids_keep, ids_mask = masking.sample(noise, K)
    dtype = train.DTYPES[case.dtype]
    tokens = masked_patch_gather(view, ids_keep, case.patch_size, dtype)
    with autocast():
        pred, _, _ = net(tokens, ids_keep, ids_mask)
    return reconstruction_error(pred, view, ids_mask, case.patch_size, floor=FLOOR)[0].mean()


def their_loss(case, net, view, noise, autocast):
    """-> the loss of ViTMAEForPreTraining, which takes normalised pixels (B, 3, S, S)."""
    scale, shift = (v.view(3, 1, 1) for v in scale_of_patch(1, view.device))
    pixels = view.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    pixels = pixels.mul_(scale).add_(shift)
    with autocast():
        return net(pixel_values=pixels, noise=noise).loss


# ---- one candidate, in a process of its own ------------------------------------------------------


def fixed_views(case, device):
    """views u8 (B, S, S, 3), half of each nearly flat, and noise (8, B, N): always the same."""
    draws = train.seeded(0)
    B = case.batch
    S = case.image_size
    view = torch.randint(256, (B, S, S, 3), generator=draws, dtype=torch.uint8)
    view[:, : S // 2] //= 64
    noise = torch.rand(8, B, (S // case.patch_size) ** 2, generator=draws)
    return view.to(device), noise.to(device)


def make_step(case, folder, device):
    """-> step(i): an update -> its loss, on the device."""
    net, loss_of = make_network(case, folder)
    net.train().to(device)
    optimizer = train.make_optimizer(net, 1e-4, 0.05)
    mode = "reduce-overhead" if device.type == "cuda" else None  # as pretrain.py
    net = torch.compile(net, mode=mode) if case.compile else net
    view, noise = fixed_views(case, device)
    autocast = train.autocast_of(device, case.dtype)

    def step(i):
        loss = loss_of(case, net, view, noise[i % len(noise)], autocast)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measured(case, folder, warmup, steps, impl="auto"):
    """-> losses of the warm-up, then seconds of a step, and memory."""
    device = train.pick_device(case.device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 in convolutions, too
    patches.IMPL = impl
    try:
        step = make_step(case, folder, device)
        losses = [step(i).item() for i in range(warmup)]
        start = bench.now(device)
        for i in range(steps):
            step(i)
        seconds = (bench.now(device) - start) / max(1, steps)
    except RuntimeError as problem:  # a full memory, or what a compiler can't do
        return {"note": f"{type(problem).__name__}: {problem}".splitlines()[0][:200]}
    return {"losses": losses, "seconds": seconds, "peak_mb": train.peak_memory_mb(device)}


# ---- rows ----------------------------------------------------------------------------------------


def row_of(case, folder, reference, counts):
    """Measure a candidate in a process of its own -> its columns: a speed, or why it has none."""
    try:
        found = bench.alone(measured, case, folder, *counts)
    except UserError as problem:  # killed, as it is where memory is full
        found = {"note": str(problem)}
    problem = found.get("note") or agree(found["losses"], reference, case.dtype)
    if problem and case.candidate == "AniMask":
        raise UserError(f"{name_of(case)}: {problem}; no speed is reported")
    if problem:
        return {"note": problem}
    speed = round(case.batch / found["seconds"], 2)
    return {"images_per_s": speed, "peak_mb": round(found["peak_mb"])}


def compare(table, cases, turns, counts):
    """The gate, then all cases in turns, ours first -> lines of a summary."""
    ours = cases[0]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(0)
        notes = {"step": 0, "run": {}, "norm_pix": True}
        save_network(ours.network(), folder / "model.safetensors", notes)
        if "transformers" in {case.candidate for case in cases}:
            export(folder / "model.safetensors", "hf", folder / "hf")
        eager = replace(ours, dtype="fp32")
        reference = bench.alone(measured, eager, folder, counts[0], 0, "torch")
        if "note" in reference:
            raise UserError(f"the reference of the gate: {reference['note']}")

        def speed_of(case):
            row = row_of(case, folder, reference["losses"], counts)
            table.add(asdict(case) | row)
            return row.get("images_per_s", 0.0)

        calls = {case: functools.partial(speed_of, case) for case in cases}
        return summary(bench.in_turns(calls, turns))


def name_of(case):
    settings = f"{'compiled' if case.compile else 'not compiled'}, {case.attention} attention"
    return f"{case.candidate} ({settings}), {case.dtype}, decoder {case.decoder}"


def summary(speeds):
    """{case: images a second of each turn} -> a line for each candidate under its fastest settings.

    Of several candidates the first is ours. 0 images a second: it failed.
    """
    best = {}
    for case in sorted(speeds, key=lambda case: statistics.median(speeds[case])):
        best[case.candidate] = case
    first = next(iter(speeds)).candidate
    lines = []
    for name in dict.fromkeys(case.candidate for case in speeds):
        case, own, ours = best[name], speeds[best[name]], speeds[best[first]]
        if min(own):
            ratio = statistics.median(x / y for x, y in zip(own, ours, strict=True))
            speed = f"{statistics.median(own):g} images/s ({min(own):g} to {max(own):g})"
            lines.append(f"{name_of(case)}: {speed}, {ratio:.2f} times {first}")
    return lines


def main():
    parser = bench.parser_of(__doc__)
    add = parser.add_argument
    add("--model", default="small", choices=SIZES)
    add("--batch", type=at_least(1), metavar="B", help="images a step (16, on a GPU 256)")
    add("--dtype", nargs="+", choices=train.DTYPES, help="(fp32 bf16, on a GPU bf16)")
    args = parser.parse_args()
    device = train.pick_device(args.device)
    gpu = device.type == "cuda"
    batch = args.batch or (256 if gpu else 16)
    dtypes = args.dtype or (["bf16"] if gpu else ["fp32", "bf16"])
    decoders = DECODERS
    sizes = FULL | {"model": args.model, "batch": batch}
    counts = COUNTS["cuda" if gpu else "cpu"]
    if args.small:
        refuse_useless(args.given & {"model", "batch", "dtype"}, "with --small")
        dtypes = ["fp32"]
        decoders = ["32x1"]
        sizes = TINY
        counts = COUNTS["small"]
    libraries = ("transformers", "triton")
    versions = {name: bench.version_of(name) for name in libraries}
    table = bench.Table(args.out / f"bench_step_{device.type}.csv", device, **versions)
    candidates = ["AniMask", "transformers"]
    if versions["transformers"] == "none":
        candidates = ["AniMask"]
        print("note: transformers is missing (pip install transformers), so ours is alone")
    lines = []
    for dtype in dtypes:
        for decoder in decoders:
            case = Case(**sizes, dtype=dtype, decoder=decoder, device=str(device))
            cases = [one for name in candidates for one in case.settings(name, args.small)]
            lines += compare(table, cases, args.turns, counts)
    print(*lines, f"wrote    {table.path}", sep="\n")


if __name__ == "__main__":
    cli(main)
