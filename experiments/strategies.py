"""Every strategy on the same faces, as one picture: python -m maps runs/NAME --data datasets/toon

Attention and difficulty are a run's own: which tokens are unusual for their place, and the mean error of each patch
under random masks, which is what the head of `learned` is trained to predict. Figure and parts are the true ones.
"""

import argparse
import functools

import torch

import data
import mask as masking
from common import guidance, plots
from common.checkpoints import load_encoder
from common.evaluate import hidden_by, hide_at_random, predict
from common.io import UserError, cli
from common.train import autocast_of, load_state, pick_dtype, seeded
from kernels.loss import patch_detail, patch_error
from model import MAE

RATIOS, IMAGES, DRAWS = (0.5, 0.75, 0.9), 4, 12
OF_ANOTHER = "attn_high"  # the strategy that is shown shuffled, too


@torch.no_grad()
def difficulty(model, view, autocast):
    """view u8 (B, S, S, 3) -> mean error of each patch over the random masks that hid it, (B, N)."""
    B, N, p = len(view), model.encoder.side**2, model.config["patch_size"]
    total, count = torch.zeros(B, N), torch.full((B, N), 1e-9)
    for i in range(DRAWS):
        ids_keep, ids = hide_at_random(masking.gumbel_noise(B, N, seeded(i)), view.device)
        pred, _ = predict(model, view, ids_keep, ids, autocast)
        total.scatter_add_(1, ids, patch_error(pred, view, ids, p))
        count.scatter_add_(1, ids, torch.ones(ids.shape))
    return total / count


def whole_model(run):
    """runs/NAME -> its MAE with the decoder, from the checkpoint that a resumed run would read."""
    state = load_state(f"{run}/state.pt")
    c, shapes = state["config"], state["model"]
    if "decoder.decoder_embed.weight" not in shapes:
        raise UserError(f"{run} has no decoder, as simmim has none; give a run with another mask")
    encoder, size = load_encoder(run)
    model = MAE(size, c["patch_size"], encoder.cls_token.shape[2], len(encoder.blocks), encoder.blocks[0].attn.heads,
                c["decoder_dim"], c["decoder_depth"])  # fmt: skip
    model.load_state_dict(shapes)
    return model.eval()


def known_of(model, split, rows, autocast):
    """-> views u8 (B, S, S, 3) of whole images, and all that any strategy asks for."""
    size, side, p = model.config["image_size"], model.encoder.side, model.config["patch_size"]
    index, view = next(data.whole_views(split["images"], rows, size, torch.device("cpu")))
    whole = (index, *data.full_boxes(len(index)), side, "cpu")
    every = torch.arange(side**2).expand(len(index), -1).contiguous()
    looks = guidance.attention(model.encoder, size, split["images"], rows, "unusual", autocast)
    attention = torch.cat([score for _, score in looks])
    names = split["header"]["parts"]
    return view, {"attn": attention, "detail": patch_detail(view, every, p),
                  "difficulty": difficulty(model, view, autocast), "fg": guidance.crop_map("fg", split["fg"], *whole),
                  "parts": guidance.crop_map("parts", split["parts"], *whole, len(names))}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder of pretrain.py")
    parser.add_argument("--data", required=True, help="packed dataset with true figure and parts: the demo set")
    parser.add_argument("--out", default="results/figures/strategies.png")
    args = parser.parse_args()
    split = data.open_split(args.data, "val")
    if not split["header"].get("parts"):
        raise UserError(f"{args.data} has no true parts; python data.py toon --out datasets/toon makes a set with them")
    device = torch.device("cpu")
    autocast = autocast_of(device, pick_dtype("auto", device)[0])
    model = whole_model(args.run)
    rows, g = data.evenly_spaced(len(split["images"]), IMAGES), model.encoder.side
    view, known = known_of(model, split, rows, autocast)
    hide = functools.partial(hidden_by, g=g, n=len(view), ratios=RATIOS)
    columns = [(name, hide(name, known)) for name in masking.STRATEGIES]
    shuffled = {name: x.roll(1, 0) for name, x in known.items()}
    columns.insert(
        list(masking.STRATEGIES).index(OF_ANOTHER) + 1, (f"{OF_ANOTHER}\nshuffle=1", hide(OF_ANOTHER, shuffled))
    )
    maps = [("attention", known["attn"].unflatten(1, (g, g))),
            ("parts", known["parts"].argmax(2).unflatten(1, (g, g)))]  # fmt: skip
    plots.mask_sheet(args.out, "What each strategy hides first, at the end of a run", view, maps, columns, width=1350)


if __name__ == "__main__":
    cli(main)
