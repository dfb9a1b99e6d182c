"""What each strategy adds to a training step: python -m benchmarks.masks --data datasets/toon

Guidance (maps cut as the images are, priorities, the sampler; for `learned` its head, forward and
backward) and the step itself are timed in one process, interleaved, with cached maps: the forward
passes of a self-teacher are extra. What the agreement of two
views adds to a step of as many views stands beside them: the loss by a pooler or by the CLS token,
other backgrounds, colour jitter; and what a teacher would that looks at every view instead of
keeping maps. `true parts` are the demo set's own, finer than those of maps.py. squares has a step of
its own: it encodes all patches. On a CPU it is the processor's time of this process that counts, so
that other work on the machine does not.
"""

import contextlib
import functools
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import data
import mask as masking
from benchmarks import OUT, about, now
from common import guidance
from common.agreement import SETTINGS, Agreement
from common.command import Parser, at_least, cli, progress, refuse_file
from common.train import autocast_of, make_optimizer, pick_device, pick_dtype, seeded
from experiments.tables import replace_rows, rows_there
from kernels.gather import masked_patch_gather
from kernels.loss import reconstruction_loss
from model import MAE, SIZES, Pooler, SimMIM

BATCH, RATIO, DECODER_DEPTH = 32, 0.75, 2


@contextlib.contextmanager
def timed(times, device):
    """Append the seconds of what happens inside: of this process's CPU work, or until all work of
    the GPU has ended.
    """
    clock = functools.partial(now, device) if device.type == "cuda" else time.process_time
    start_time = clock()
    yield
    times.append(clock() - start_time)


def fake_maps(need, n, side):
    """Maps of the size that maps.py gives; what is in them costs nothing."""
    draw = np.random.default_rng(0)
    if need == "attn":
        return draw.random((n, side, side)).astype(np.float16)
    grid, top = (32, 256) if need == "fg" else (side, 7)
    return draw.integers(0, top, (n, grid, grid), dtype=np.uint8)


def make_guide(name, encoder, train, device, autocast):
    """The guide that pretrain.py would make for this strategy, its maps already there: a teacher's
    are not measured.
    """
    guide = guidance.Guide(name, {}, encoder, ".", autocast)
    if guide.need in guidance.IN_FILES:
        guide.maps, guide.parts = fake_maps(guide.need, len(train["images"]), encoder.side), 7
    if guide.predictor:
        guide.predictor.to(device)
    return guide


def masked_ids(name, guide, rows, boxes, flip, view, noise, K):
    """What a strategy does before the forward pass, and its head's backward after it -> ids_keep,
    ids_mask.
    """
    N = noise.shape[1]
    boxes, flip = boxes.to(view.device), flip.to(view.device)
    patches = guide.scores(rows, boxes, flip, view)
    ids_keep, ids_mask = masking.sample(masking.STRATEGIES[name](patches, noise, 0.7, N - K), K)
    if guide.predictor:
        guide.loss(ids_mask, noise[:, : N - K]).backward()
    return ids_keep, ids_mask


def step(model, optimizer, view, ids_keep, ids_mask, patch, autocast):
    """Forward, backward and update of the network, the same for every strategy but squares."""
    with autocast():
        pred, _, _ = model(masked_patch_gather(view, ids_keep, patch), ids_keep, ids_mask)
    reconstruction_loss(pred, view, ids_mask, patch).backward()
    optimizer.step()
    optimizer.zero_grad()


def make_extras(model, train, device):
    """{what is timed beside the masks: f(view, rows, boxes, flip)}: forward, and backward where it
    learns.
    """
    figure = fake_maps("fg", len(train["images"]), model.encoder.side)
    agreement = Agreement(model.config["dim"], train, SETTINGS["pooler"]).to(device)
    model.encoder.pooler = Pooler(model.config["dim"], model.config["heads"]).to(device)
    N, D = model.encoder.side**2, model.config["dim"]
    tokens = torch.randn(BATCH, 1 + masking.kept(N, RATIO), D, device=device, requires_grad=True)
    draws, pairs = (
        torch.rand(BATCH, 4, device=device),
        lambda rows: rows[: BATCH // 2].repeat_interleave(2),
    )

    def swap(view, rows, boxes, flip):
        S, crop = view.shape[1], (boxes.to(device), flip.to(device))
        fg = guidance.crop_map(figure, rows, *crop, S).view(-1, S, S, 1)
        data.swap_backgrounds(view, fg, draws[:, 3], 0.7, 2)

    def look(view, *_):
        with torch.no_grad():
            model.encoder.patch_attention(view, "pooler")

    return {
        "agreement, CLS token": lambda view, rows, *_: agreement(
            tokens[:, 0], pairs(rows)
        ).backward(),
        "agreement, pooler": lambda view, rows, *_: agreement(
            model.encoder.pooler(tokens), pairs(rows)
        ).backward(),
        "other backgrounds": swap,
        "colour jitter": lambda view, *_: data.jitter_colour(view, draws[:, :3], 0.3),
        "a look at every view": look,
    }


def measure(size, train, device, rounds):
    """-> {strategy: median milliseconds of guidance}, and those of a "step"; of squares those of its
    own step.
    """
    autocast, S, patch = (
        autocast_of(device, pick_dtype("auto", device)[0]),
        size["image_size"],
        size["patch_size"],
    )
    model, baseline = MAE(**size, decoder_depth=DECODER_DEPTH).to(device), SimMIM(**size).to(device)
    optimizer, its_optimizer = (make_optimizer(net, 1e-4, 0.05) for net in (model, baseline))
    N = model.encoder.side**2
    names = [name for name in masking.STRATEGIES if name != "squares"]
    guides = {name: make_guide(name, model.encoder, train, device, autocast) for name in names}
    if "parts" in train:
        guides["true parts"] = make_guide("parts", model.encoder, train, device, autocast)
        guides["true parts"].maps = train["parts"]
    extras = make_extras(model, train, device)
    times = {name: [] for name in [*guides, "step", "squares", *extras]}
    for i in progress(range(rounds), "rounds", leave=False):
        draws = seeded(0, i)
        rows = torch.randperm(len(train["images"]), generator=draws)[:BATCH]
        boxes, flip = data.draw_boxes(BATCH, draws, 0.4)
        noise = masking.gumbel_noise(BATCH, N, draws).to(device)
        view = data.view_images(data.take(train["images"], rows, device), boxes, flip, S)
        for name, guide in guides.items():
            with timed(times[name], device):
                ids = masked_ids(
                    name.split()[-1], guide, rows, boxes, flip, view, noise, masking.kept(N, RATIO)
                )
        with timed(times["step"], device):
            data.view_images(data.take(train["images"], rows, device), boxes, flip, S)
            step(model, optimizer, view, *ids, patch, autocast)
        for name, extra in extras.items():
            with timed(times[name], device):
                extra(view, rows, boxes, flip)
        optimizer.zero_grad()
        with timed(times["squares"], device):
            ids = masking.sample(masking.squares({}, noise, 0.0, 0), masking.kept(N, 0.6))
            step(baseline, its_optimizer, view, *ids, patch, autocast)
    return {name: 1000 * statistics.median(x[rounds // 5 :]) for name, x in times.items()}


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="packed dataset")
    parser.add_argument("--model", default="nano", choices=SIZES)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--rounds", type=at_least(1), default=40, help="steps that are timed")
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder of bench_masks.csv, where rows of "
        "this model and machine are replaced (default: runs/bench)",
    )
    args = parser.parse_args()
    path, keys = args.out / "bench_masks.csv", ("mask", "model", "machine")
    refuse_file(args.out)
    rows_there(path, keys)
    device, size = pick_device(args.device), SIZES[args.model]
    ms = measure(size, data.open_split(args.data, "train"), device, args.rounds)
    ms["squares"] -= ms["step"]  # what it takes more
    step_ms, where = ms.pop("step"), {"model": args.model, "batch": BATCH} | about(device)

    def less(name):
        return ms["random"] if name in masking.STRATEGIES or name == "true parts" else 0.0

    over = {name: 100 * (x - less(name)) / (step_ms + ms["random"]) for name, x in ms.items()}
    rows = [
        {
            "mask": name,
            "guidance_ms": round(x, 3),
            "step_ms": round(step_ms, 1),
            "over_random_percent": round(over[name], 1),
            **where,
        }
        for name, x in ms.items()
    ]
    replace_rows(path, rows, keys)
    for row in rows:
        print(
            f"{row['mask']:20} {row['guidance_ms']:8.3f} ms   {row['over_random_percent']:+.1f} % over random"
        )
    print(f"wrote    {path}")


if __name__ == "__main__":
    cli(main)
