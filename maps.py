"""Stage 1: maps of a data set that masks are guided by: attention, figure (saliency), parts; once per image, in a file.

    python maps.py --data datasets/toon --map saliency

Reads:  datasets/NAME (the demo set is drawn if it is not there), runs/NAME where an encoder is asked for
Writes: maps/NAME/ saliency.safetensors, attn.safetensors or parts.safetensors, with what made it in the header, and
        sheet-saliency.png and so on: images, maps, and what each strategy hides by them at three ratios

    attn      f16 (n, g, g)  attention in an encoder's last block, mean over heads; g patches a side as in the encoder
    saliency  u8 (n, 32, 32) probability of figure, 255 is 1: coarse (colours alone) or refined (with an encoder)
    parts     u8 (n, g, g)   0 background, 1..K clusters of the encoder's features on the figure
"""

import argparse
import functools
import math
from pathlib import Path

import torch
from tqdm import tqdm

import data
import guides
import loader
import mask as masking
import plumbing
import saliency
from checkpoints import load_encoder
from evaluate import hidden_by
from lab import plot
from plumbing import UserError

SAMPLE = 1024  # images that the mean token of each place and the codebook of parts are made from
SHEET_IMAGES, SHEET_RATIOS = 8, (0.5, 0.75, 0.9)
NEEDED_AS = {"attn": "attn", "saliency": "fg", "parts": "parts"}  # map: what strategies call it (masking.NEEDS)
FLAGS = {"attn": {"run", "source"}, "saliency": {"run", "quality"}, "parts": {"run", "quality", "parts"}}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="datasets/toon", metavar="DIR", help="packed set, or images to pack (default: the demo set)")
    add("--map", required=True, choices=FLAGS, help="attention, probability of figure, or parts of the figure")
    add("--run", metavar="RUN", help="encoder: a run of pretrain.py; for attn, parts and --quality refined")
    add(
        "--quality",
        choices=["coarse", "refined"],
        help="saliency from colours alone, or with the encoder (default: coarse; for parts: refined)",
    )
    add(
        "--source",
        choices=guides.SOURCES,
        help="attention of CLS to a patch, of all patches to it, or how unusual its token is (default: as pretrain.py)",
    )
    add("--parts", type=int, metavar="K", help="parts of the figure, beside the background (default: 6)")
    add("--split", default="train", choices=["train", "dev", "val", "test"], help="whose images (default: train)")
    add("--out", metavar="DIR", help="folder to write to (default: maps/ and the name of the data)")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the encoder's matrix products")
    return parser.parse_args()


def check(args):
    """What is missing, and what does not go together; then the defaults."""
    given = {name for name in ("run", "quality", "source", "parts") if getattr(args, name) is not None}
    if extra := given - FLAGS[args.map]:
        raise UserError(f"--{min(extra)} has no meaning for --map {args.map}; leave it out")
    args.quality = args.quality or {"saliency": "coarse", "parts": "refined"}.get(args.map)
    args.source = args.source or (guides.usual_source(args.run or "self") if args.map == "attn" else None)
    args.parts = 6 if args.parts is None and args.map == "parts" else args.parts
    if args.map == "saliency" and args.quality == "coarse":
        if args.run:
            raise UserError("--quality coarse uses no encoder; leave --run out, or say --quality refined")
    elif not args.run:
        raise UserError(f"--map {args.map}{' --quality refined' * (args.map == 'saliency')} needs an encoder; add "
                        "--run runs/NAME, which python pretrain.py makes")  # fmt: skip


# ---- what the encoder says of whole images, a chunk at a time -------------------------------------------------------


@torch.no_grad()
def tokens_of(images, rows, encoder, image_size, device, autocast):
    """Yield (images u8 (B, S, S, 3), patch tokens fp32 (B, N, D)) of rows (i64), in order."""
    for index in rows.split(loader.CHUNK):
        batch = loader.take(images, index, device)
        view = loader.view_images(batch, *loader.full_boxes(len(index)), image_size)
        with autocast():
            tokens = saliency.last_tokens(encoder, view)
        yield batch.to(home(device)), tokens.to(home(device))


def home(device):
    """Where saliency.py computes: Metal has no eigh, and no pooling to a grid that does not divide the picture."""
    return torch.device("cpu") if device.type == "mps" else device


def mean_of_places(stream):
    """What the tokens at each place have in common: their mean over a sample of images, (N, D)."""
    total, count = 0, 0
    for _, tokens in stream:
        total, count = total + tokens.double().sum(0), count + len(tokens)
    return (total / count).float()


def fit_parts(stream, figure_of, place, K):
    """A codebook (K, D) for the whole data set: k-means over the figures' patches of a sample of images."""
    chosen = []
    for images, tokens in stream:
        figure = figure_of(images, tokens)
        chosen.append(saliency.relative_to_figure(tokens, figure, place)[figure])
    points = torch.cat(chosen)
    if len(points) < K:
        raise UserError(f"--parts {K} are more than the {len(points)} patches of figure that were found")
    return saliency.kmeans(points[:: math.ceil(len(points) / 20000)], K, plumbing.seeded(0))


# ---- the three maps: each yields chunks of rows, in the order of the images -----------------------------------------


def coarse_rows(images, rows, device):
    for index in rows.split(loader.CHUNK):
        yield as_bytes(saliency.coarse(loader.take(images, index, home(device))))


def refined_rows(stream, place):
    for images, tokens in stream:
        yield as_bytes(saliency.refined(images, tokens, place))


def part_rows(stream, figure_of, place, centres, side):
    for images, tokens in stream:
        yield (
            saliency.parts_of(tokens, figure_of(images, tokens), place, centres).unflatten(1, (side, -1)).cpu().numpy()
        )


def as_bytes(probability):
    return (probability * 255).round().to(torch.uint8).cpu().numpy()


def figure_mask(images, tokens, place, quality, side):
    """Which patches are figure, (B, N) bool."""
    chance = saliency.refined(images, tokens, place) if quality == "refined" else saliency.coarse(images)
    return saliency.to_patches(chance, side) > 0.5


def rows_of_map(args, images, device):
    """-> (grid, dtype, generator of chunks) of the map that was asked for."""
    every, some = torch.arange(len(images)), loader.spread(len(images), SAMPLE)
    if args.map == "saliency" and args.quality == "coarse":
        return saliency.GRID, "U8", coarse_rows(images, every, device)
    encoder, size = load_encoder(args.run)
    encoder.to(device)
    autocast = plumbing.autocast_of(device, plumbing.pick_dtype(args.dtype, device)[0])
    if args.map == "attn":
        return encoder.side, "F16", guides.attention_rows(images, encoder, size, args.source, autocast)
    if args.map == "parts" and not 1 <= args.parts <= min(encoder.side**2, 255):
        raise UserError(f"--parts {args.parts} must lie between 1 and the {encoder.side**2} patches of {args.run}")
    stream = functools.partial(tokens_of, images, encoder=encoder, image_size=size, device=device,
                               autocast=autocast)  # fmt: skip
    place = mean_of_places(stream(some))
    if args.map == "saliency":
        return saliency.GRID, "U8", refined_rows(stream(every), place)
    figure_of = functools.partial(figure_mask, place=place, quality=args.quality, side=encoder.side)
    centres = fit_parts(stream(some), figure_of, place, args.parts)
    return encoder.side, "U8", part_rows(stream(every), figure_of, place, centres, encoder.side)


# ---- the sheet ------------------------------------------------------------------------------------------------------


def draw_sheet(path, name, images, maps, parts):
    """images u8 (n, S, S, 3), maps (n, g, g) of them: what the strategies that need this map hide, and the controls."""
    g = 12 if name == "saliency" else maps.shape[-1]  # as with the demo's network; saliency has no encoder's grid
    known = {NEEDED_AS[name]: known_of(name, maps, g, parts)}
    guided = [s for s in masking.STRATEGIES if masking.NEEDS.get(s) == NEEDED_AS[name]]
    shuffled = {key: value.roll(1, 0) for key, value in known.items()}
    columns = [(s, hidden_by(s, known, g, len(images), SHEET_RATIOS)) for s in guided]
    columns += [(f"{s}\nshuffled", hidden_by(s, shuffled, g, len(images), SHEET_RATIOS)) for s in guided[:1]]
    controls = [s for s in masking.STRATEGIES if s not in masking.NEEDS]
    columns += [(s, hidden_by(s, {}, g, len(images), SHEET_RATIOS)) for s in controls]
    plot.mask_sheet(path, f"What each strategy hides, by {name} maps", images, [(name, maps)], columns)


def known_of(name, maps, g, parts):
    """maps (n, G, G) of whole images -> what the strategies get: (n, g*g), or (n, g*g, 1 + parts) shares of parts."""
    if name == "parts":
        return torch.nn.functional.one_hot(maps.flatten(1).long(), 1 + parts).float()
    return saliency.to_patches(maps.float(), g) / (255 if name == "saliency" else 1)


def main():
    args = parse_args()
    check(args)
    device = plumbing.pick_device(args.device)
    folder = data.dataset_folder(args.data)
    split = loader.open_split(folder, args.split)
    path = loader.map_file(args.out or Path("maps") / folder.name, args.map, split)
    if path.exists():
        raise UserError(f"{path} is there already; remove it, or give another --out")
    grid, dtype, rows = rows_of_map(args, split["images"], device)
    n = len(split["images"])
    header = {"map": args.map, "quality": args.quality, "source": args.source, "parts": args.parts, "grid": grid,
              "by": args.run or "", "data": folder.name, "split": args.split, "images": n,
              "data_digest": loader.fingerprint(split), "commit": plumbing.commit()}  # fmt: skip
    header = {key: value for key, value in header.items() if value is not None}
    bar = tqdm(rows, f"{folder.name}/{path.stem}", math.ceil(n / loader.CHUNK), disable=None)
    loader.write_rows(path, args.map, bar, (n, grid, grid), dtype, header)
    shown = loader.spread(n, SHEET_IMAGES)
    sheet = path.with_name(f"sheet-{path.stem}.png")
    maps = torch.from_numpy(loader.open_map(path, args.map, split)[shown.numpy()])
    draw_sheet(sheet, args.map, split["images"][shown.numpy()], maps, args.parts)
    strategy = next((s for s in masking.STRATEGIES if masking.NEEDS.get(s) == NEEDED_AS[args.map]), "random")
    print(f"{path}: {n} maps of {grid} x {grid}; look at {sheet}\n"
          f"next: python pretrain.py --data {folder} --mask {strategy}")  # fmt: skip


if __name__ == "__main__":
    plumbing.cli(main)
