"""The front page's picture, light and dark: a drawing, where an encoder looks, what it sees and predicts, who it is.

    python -m experiments.front_page runs/NAME --out results/figures

Reads:  a run of pretrain.py, the newest recogniser that was made of it, and its gallery
Writes: OUT/front-light.png and OUT/front-dark.png
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import demo
import recognize
from common import plots
from common.command import Parser, between, cli, refuse_file
from common.evaluate import hide
from common.io import UserError
from common.plots import plt
from finetune_lora import load_classifier
from ingest import toon

THEMES = {
    "light": ("#FFFFFF", plots.INK),
    "dark": ("#0D1117", "#E6EDF3"),
}  # paper and ink of a README
SIZE = 2.1  # inches of a panel


def heat(scores, view):
    """Scores of patches (1, N), view (1, S, S, 3) -> f32 (S, S, 3): the picture, brighter where
    they are high.
    """
    g = round(scores.shape[1] ** 0.5)
    low, high = scores.quantile(0.05), scores.quantile(0.98)
    level = ((scores - low) / (high - low)).clamp(0, 1).view(1, 1, g, g)
    level = F.interpolate(level, size=view.shape[1:3], mode="bicubic").clamp(0, 1)[0, 0].cpu()
    colours = torch.from_numpy(plt.get_cmap("viridis")(level.numpy())[..., :3]).float()
    return 0.45 * view[0].cpu() / 255 + 0.55 * colours


@torch.no_grad()
def story(run, who, number):
    """-> [(caption, picture)] of a drawing that no run saw, and what the recogniser says of it:
    [(name, share)].
    """
    picture, (net, header) = demo.drawing(who, number), demo.loaded(demo.load_mae, run)
    square, N = demo.square_of(picture, net.config["image_size"]), net.encoder.side**2
    view = torch.from_numpy(square).to(demo.MACHINE.device)
    attention = demo.maps_of(net, picture, view, "attn")["attn"]
    ids_keep, ids_mask = demo.draw_mask("random", {}, N, 0.75, 1.0, 0)
    pasted, decibel = demo.filled_in(net, header, view, ids_keep, ids_mask)
    seen = hide(view, ids_mask, net.config["patch_size"])[0]
    pictures = [
        ("a new drawing", view[0]),
        ("its attention", heat(attention, view)),
        (f"seen: {len(ids_keep[0])} of {N} patches", seen),
        (f"predicted: the rest, {decibel:.1f} dB", pasted[0]),
    ]
    name = demo.made_of(run, demo.RECOGNISER)
    if name is None:
        raise UserError(f"no recogniser was made of {run} yet: python finetune_lora.py {run}")
    net, header = demo.loaded(load_classifier, name)
    gallery = recognize.open_gallery(name)
    face = demo.square_of(picture, header["packed_size"], header["crop"], header["margin"])
    logits, embeddings = recognize.embed(net, face, demo.MACHINE.autocast)
    row = recognize.answers([who], logits, embeddings, gallery, 1)[0]
    print(recognize.in_words(row))
    shares, ids = (logits[0].float() / gallery["temperature"]).softmax(0).topk(3)
    shares = shares * row["confidence"] / shares[0]  # the rest: it may be nobody known
    return pictures, [
        (header["classes"][k], share)
        for k, share in zip(ids.tolist(), shares.tolist(), strict=True)
    ]


def draw(path, theme, pictures, names):
    """One row: pictures with arrows between them, then names as bars."""
    paper, ink = THEMES[theme]
    with plt.rc_context({"figure.facecolor": paper, "savefig.facecolor": paper, "text.color": ink}):
        figure, axes = plt.subplots(
            1, len(pictures) + 1, figsize=(SIZE * (len(pictures) + 1), SIZE + 0.15)
        )
        figure.get_layout_engine().set(wspace=0.09)
        for axis, (caption, picture) in zip(axes, pictures, strict=False):
            axis.imshow(picture.cpu().numpy())
            axis.set_title(caption, fontsize=10, color=ink)
            axis.annotate(
                "",
                (1.11, 0.5),
                (1.0, 0.5),
                "axes fraction",
                "axes fraction",
                arrowprops={"arrowstyle": "->", "color": ink},
                annotation_clip=False,
            )
        shares = [share for _, share in names]
        axes[-1].set_title("who is it?", fontsize=10, color=ink)
        axes[-1].barh(range(3), shares, 0.34, color=[plots.BLUE, ink, ink])
        for k, (name, share) in enumerate(names):
            axes[-1].text(
                0,
                k - 0.24,
                f"{name}, {share:.0%}",
                va="bottom",
                fontsize=13 if k == 0 else 10,
                color=ink,
            )
        axes[-1].set(xlim=(-0.06, 1.06), ylim=(2.6, -0.8), facecolor=paper, box_aspect=1)
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        plots.save(figure, path)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", metavar="RUN", help="runs/NAME of pretrain.py")
    add(
        "--who",
        default="akika",
        choices=[person["name"] for person in toon.cast()],
        metavar="NAME",
        help="whose drawing (default: %(default)s)",
    )
    add(
        "--number",
        type=between(0, 99, int),
        default=0,
        metavar="N",
        help="which drawing of that character",
    )
    add(
        "--out",
        default="results/figures",
        metavar="DIR",
        help="folder of both pictures (default: %(default)s)",
    )
    args = parser.parse_args()
    refuse_file(args.out)
    pictures, names = story(demo.choose_run(args.run), args.who, args.number)
    for theme in THEMES:
        draw(Path(args.out) / f"front-{theme}.png", theme, pictures, names)
    print(f"wrote    {args.out}/front-light.png, front-dark.png")


if __name__ == "__main__":
    cli(main)
