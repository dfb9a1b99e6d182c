"""Sheets: what strategies hide, drawn in seconds and without any training.

    python -m apps.masks                                all strategies of mask.py
    python -m apps.masks block:size=0.5 squares
    python -m apps.masks detail --t 0                   as at the start of a run

Reads:  train of datasets/NAME (the demo set is drawn if absent), its true maps or those in maps/NAME
Writes: masks.png: six images, the scores that strategies follow, and a row for each strategy

    n images   S their side   g patches a side   N = g * g patches   G cells of a map
"""

import contextlib
import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps

import data
import mask as masking
from common import guidance, plots, train
from common.checkpoints import flags_of, load_teacher
from common.train import Parser, UserError, between, cli, parse_keys

SHOWN = 6  # images of a sheet
SIDE = 8  # patches a side, as in the networks that pretrain.py trains by default
SIZE = 128  # px of an image on a sheet, at most
WITHOUT = {  # why a score can't be drawn, where it is no lack of maps
    "attn": "the score is the attention of a trained network; add --teacher runs/NAME",
    "difficulty": "the score is learned during a run, whose masks.png shows it",
}


# ---- what strategies read ------------------------------------------------------------------------


def parse_strategy(words):
    """ "attn_high:beta=2" -> the strategy, with these keys."""
    name, params = parse_keys(words, masking.PARAMS, "strategy")
    for key in ("shuffle", "throw"):  # they need a batch, and a loss
        if params.pop(key, 0):
            raise UserError(f"{words}: {key} acts in a run alone; leave it out")
    return functools.partial(masking.STRATEGIES[name], **params)


def score_of(words):
    """What a strategy with its keys reads: an entry of NEEDS, or None."""
    return masking.NEEDS.get(words.partition(":")[0])


def images_of(split, side):
    """-> the indices of some images of a set, and their views u8 (n, S, S, 3), of side * side patches."""
    indices = data.evenly_spaced(len(split["images"]), SHOWN)
    size = side * max(1, SIZE // side)
    ((_, view),) = data.whole_views(split["images"], indices, size, torch.device("cpu"))
    return indices, view


def read_scores(folder, split, indices, view, side, where):
    """-> {score: (n, N), of parts (n, N, parts)} of whole images, `indices` of the set, and {score: why not}.

    The view itself is among the scores. where {score: folder of apps/maps.py}; other maps are those
    that pretrain.py would take.
    """
    cut = (indices, *data.full_boxes(len(indices)), side)
    scores, missing = {"view": view}, {}
    for name in guidance.MAPS:
        try:
            maps, parts, _ = guidance.open_maps(name, where.get(name, "auto"), folder, split)
        except UserError as problem:
            missing[name] = str(problem)  # the exception would hold this frame, and its open map
            continue
        scores[name] = guidance.crop_map(maps, *cut, parts)
    return scores, missing | WITHOUT


def attention_of(run, encoder, images, indices):
    """(n, N): the attention of a trained network, as masks with this --teacher read it."""
    kind = guidance.default_attention(encoder, flags_of(run))
    chunks = guidance.attention(encoder, images, indices, kind, contextlib.nullcontext)
    return torch.cat([score for _, score in chunks])


def known_of(strategies, scores):
    """{words: function} of these strategies, but for those whose score is not among these."""
    return {words: f for words, f in strategies.items() if score_of(words) in (None, *scores)}


# ---- the picture ---------------------------------------------------------------------------------


def hidden_by(strategy, scores, n, N, ratio, t=1.0):
    """(n, N) bool: what a strategy hides at t of a run, in [0, 1], with the same noise as others."""
    K = masking.kept(N, min(ratio, 1 - 1 / N))  # of a small grid, one patch stays
    noise = masking.gumbel_noise(n, N, train.seeded(0))
    _, ids_mask = masking.sample(strategy(scores, noise, t, N - K), K)
    return torch.zeros(n, N, dtype=torch.bool).scatter(1, ids_mask, True)


def coloured(maps):
    """(n, G, G) -> u8 (n, G, G, 3). int64 are the numbers of parts: 20 have a colour of their own.

    Others are drawn in viridis: u8 from 0 to 255, floats from 0 to their image's maximum.
    """
    if maps.dtype == torch.int64:
        colours = colormaps["tab20"].colors
        palette = np.array([(0.93, 0.93, 0.93), *colours[::2], *colours[1::2]])  # 0 is light grey
        return np.uint8(255 * palette[np.where(maps > 0, 1 + (maps - 1) % len(colours), 0)])
    top = 255
    if maps.is_floating_point():
        top = maps.float().amax((1, 2), keepdim=True).clamp(min=1e-9)
    return np.uint8(255 * colormaps["viridis"]((maps / top).float().numpy())[..., :3])


def draw_sheet(path, title, view, side, maps, strategies, scores, ratio=0.75, t=1.0):
    """Views u8 (n, S, S, 3), maps {name: (n, G, G)}, then a row for each of strategies.

    strategies {words: function}: each gets of the scores the one that it needs, as in training.
    """
    n, S = view.shape[:2]
    rows = [("image", view)]
    rows += [(name, coloured(some)) for name, some in maps.items()]
    dark = (0.16 * view.float().mean(3, keepdim=True) + 38).byte()  # a hidden patch
    for words, strategy in strategies.items():
        known = {name: scores[name] for name in ("view", score_of(words)) if name}
        hidden = hidden_by(strategy, known, n, side * side, ratio, t).view(n, 1, side, side)
        hidden = F.interpolate(hidden.float(), S)[:, 0, :, :, None] > 0
        rows.append((words.replace(":", ":\n"), torch.where(hidden, dark, view)))
    plots.image_grid(path, title, rows)


# ---- the command ---------------------------------------------------------------------------------


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    every = [*masking.STRATEGIES]
    words = "STRATEGY[:key=value,...]"
    add("show", nargs="*", default=every, metavar=words, help=f"default: all of {', '.join(every)}")
    add("--data", default="datasets/toon", metavar="DIR", help="packed set, or images to pack")
    add("--teacher", metavar="RUN", help="a trained network, whose attention attn_* follow")
    add("--ratio", type=between(0, 1), default=0.75, help="share of patches that is hidden")
    add("--t", type=between(0, 1), default=1.0, help="progress of the run (default: its end)")
    add("--out", default="masks.png", metavar="FILE.png", help="default: masks.png, drawn anew")
    args = parser.parse_args()
    args.strategies = {words: parse_strategy(words) for words in args.show}
    if "attn" not in map(score_of, args.show):
        train.refuse_useless(args.given & {"teacher"}, f"with {' '.join(args.show)}")
    if Path(args.out).suffix != ".png":
        raise UserError(f"--out {args.out}: give the name of a PNG, such as masks.png")
    if "out" in args.given:  # the default may be drawn over, while you try keys one after the other
        train.refuse_overwrite([args.out])
    return args


def tell_left_out(strategies, known, missing):
    """A line for each score that is not known, with its strategies; a UserError if none is `known_of`."""
    unknown = {}
    for words in strategies:
        if words not in known:
            unknown.setdefault(score_of(words), []).append(words)
    for score, names in unknown.items():
        why = f"{', '.join(names)}: {missing.get(score, f'nothing here computes {score}')}"
        if not known:
            raise UserError(why)
        print(f"left out {why}")


def main():
    args = parse_args()
    encoder = load_teacher(args.teacher) if args.teacher else None
    side = encoder.side if encoder else SIDE
    folder = data.open_or_pack(args.data)
    split = data.open_split(folder, "train")
    indices, view = images_of(split, side)
    scores, missing = read_scores(folder, split, indices, view, side, where={})
    if encoder:
        scores["attn"] = attention_of(args.teacher, encoder, split["images"], indices)
    strategies = known_of(args.strategies, scores)
    tell_left_out(args.strategies, strategies, missing)
    maps = guidance.as_pictures({x: scores[x] for x in map(score_of, strategies) if x})
    when = "at the end of a run" if args.t == 1 else f"after {args.t:.0%} of a run"
    title = f"What masks hide {when}, {args.ratio:.0%} of the patches: {folder.name}"
    draw_sheet(args.out, title, view, side, maps, strategies, scores, args.ratio, args.t)
    print(f"wrote {args.out}: {len(view)} images of {folder}, cut into {side} x {side} patches")
    words = ["--mask", next(iter(strategies))]
    for name in sorted(args.given & {"data", "ratio"}):
        words += [f"--{name}", str(getattr(args, name))]
    print(f"next: python pretrain.py {train.quoted(*words)}")


if __name__ == "__main__":
    cli(main)
