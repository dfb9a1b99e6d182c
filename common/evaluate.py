"""Evaluations while a model trains, the same for every run: whole images, one fixed mask."""

import contextlib
import functools

import torch
from tqdm import tqdm

import data
import mask as masking
from common import guidance
from common.readout import (
    effective_rank,
    knn_votes,
    ridge,
    standardise,
    thumbnails,
    topk,
)
from common.train import read_log, seeded
from kernels.patches import (
    FLOOR,
    masked_patch_gather,
    mean_of_neighbours,
    patch_bytes,
    patch_error,
    predicted_stats,
)
from model import extremes, put_patches, to_pixels

EVAL_RATIO = 0.75  # of the fixed mask
EVAL_IMAGES, BANK_IMAGES = 1024, 2048  # at most
GRAY = 128  # a masked patch in a picture


# ---- while a model trains ------------------------------------------------------------------------


def predict(model, view, ids_keep, ids_mask, autocast=contextlib.nullcontext, floor=FLOOR):
    """view u8 (B, s, s, 3) -> pred (B, M, P), and stats (B, M, 2) that undo norm_pix."""
    p = model.config["patch_size"]
    visible, visible_stats = masked_patch_gather(view, ids_keep, p, return_stats=True, floor=floor)
    with autocast():
        pred, stats, *_ = model(visible, ids_keep, ids_mask)
    stats = predicted_stats(stats, visible_stats, ids_keep, ids_mask, model.encoder.side)
    return pred.float(), stats


def masked_views(model, split, most, ratio=EVAL_RATIO):
    """Yield (view u8 (b, s, s, 3), ids_keep, ids_mask) of `most` images under the fixed mask."""
    indices = data.evenly_spaced(len(split["images"]), most)
    N = model.encoder.side**2
    noise = masking.gumbel_noise(len(indices), N, seeded(0)).split(data.CHUNK)
    device = model.encoder.device
    views = data.whole_views(split["images"], indices, model.config["image_size"], device)
    for (_, view), chunk in zip(views, noise, strict=True):
        yield view, *masking.sample(chunk.to(device), masking.kept(N, ratio))


@torch.no_grad()
def masked_mse(model, split, target_options, autocast):
    """Mean squared error of hidden patches, all of one weight, under the fixed mask.

    target_options: {"norm_pix", "floor"}, what the model predicts (kernels.patches.targets).
    """
    # Training losses of two masks can't be compared: one of them has easier patches to predict. So every
    # run is judged under this mask, whatever it trains with.
    errors = []
    for view, ids_keep, ids_mask in masked_views(model, split, EVAL_IMAGES):
        pred, _ = predict(model, view, ids_keep, ids_mask, autocast)
        p = model.config["patch_size"]
        errors.append(patch_error(pred, view, ids_mask, p, **target_options).cpu())
    return torch.cat(errors).mean().item()


@torch.no_grad()
def pooled_tokens(encoder, autocast, split, indices):
    """-> extremes (n, 2D) and mean (n, D) of the patch tokens of whole images, fp32 on the CPU."""
    pools = []
    for _, tokens in guidance.patch_tokens(encoder, split["images"], indices, autocast):
        pools.append((extremes(tokens).cpu(), tokens.mean(1).cpu()))
    return [torch.cat(pool) for pool in zip(*pools, strict=True)]


def small_thumbnails(split, indices):
    """The control: what colour alone tells, (n, 4*4*3), for both classifiers."""
    small = thumbnails(data.take(split["images"], indices, indices.device), 4)
    return small, small


def recognition(features, train, held):
    """{"knn", "linear": Top-1 in percent, "mean_rank": effective rank (1 is a collapse)}.

    "linear" is a linear classifier that is solved in one step, a ridge regression.

    features(split, indices) -> the features of the kNN (n, E) and of the ridge regression (n, D).
    """
    bank = data.evenly_spaced(len(train["images"]), BANK_IMAGES)
    queries = data.evenly_spaced(len(held["images"]), EVAL_IMAGES)
    knn_bank, ridge_bank = features(train, bank)
    knn_queries, ridge_queries = features(held, queries)
    labels, truth = train["labels"][bank], held["labels"][queries]
    classes = int(labels.max()) + 1
    x, q = standardise(ridge_bank, ridge_queries)
    # Ridge regression is solved in one step, so an evaluation costs little. probe.py has the slower
    # logistic regression, whose strength is chosen, for the end.
    W, b = ridge(x, labels, classes, penalty=1.0)
    right = knn_votes(knn_bank, labels, knn_queries, classes).argmax(1) == truth
    return {
        "knn": 100 * right.float().mean().item(),
        "linear": 100 * topk(q @ W + b, truth, 1),
        "mean_rank": effective_rank(ridge_bank),
    }


@torch.no_grad()
def attention_by_part(encoder, split, kind, autocast):
    """{part: share of the attention over share of the area}, 1 without a preference."""
    names = split["header"]["parts"]
    images = split["images"]
    indices = data.evenly_spaced(len(images), 256)
    mass, area = torch.zeros(2, len(names))
    for index, score in guidance.attention(encoder, images, indices, kind, autocast):
        boxes, flip = data.full_boxes(len(index))
        share = guidance.crop_map(split["parts"], index, boxes, flip, encoder.side, len(names))
        score = (score / score.sum(1, keepdim=True)).cpu()
        mass += torch.einsum("bn,bnp->p", score, share)
        area += share.mean(1).sum(0)
    ratios = zip(names, mass, area, strict=True)
    return {name: round((m / a).item(), 3) for name, m, a in ratios if a > 0}


def evaluate(model, guide, flags, splits, target_options, autocast, epoch):
    """A row of the log, printed: masked error; with labels, Top-1; with true parts, the attention to each.

    splits: (train, judged); "val_mse" is of the latter, whatever its name. The attention is that of the
    teacher or, where none learns, of the encoder.
    """
    train, held = splits
    model.eval()  # switches off dropout, if you add some
    row = {"epoch": epoch, "val_mse": masked_mse(model, held, target_options, autocast)}
    text = f"epoch {epoch:<4g} masked error {row['val_mse']:.4f}"
    if data.has_labels(train) and data.has_labels(held):
        features = functools.partial(pooled_tokens, model.encoder, autocast)
        row |= recognition(features, train, held)
        text += f", Top-1 kNN {row['knn']:.1f} %, ridge {row['linear']:.1f} %"
        if epoch == 0:
            small = recognition(small_thumbnails, train, held)
            row |= {f"{key}_thumbnail": value for key, value in small.items()}
            text += f" before training; thumbnails {small['knn']:.1f} %, {small['linear']:.1f} %"
    elif epoch == 0:
        text += "; no Top-1: that needs two classes or more, and labels on all images"
    tqdm.write(text)
    if held["header"].get("parts"):
        encoder = guide.teacher or model.encoder
        kind = guide.kind if guide.teacher else guidance.default_attention(encoder, vars(flags))
        row["attention_on"] = attention_by_part(encoder, held, kind, autocast)
    model.train()
    return row


# ---- pictures ------------------------------------------------------------------------------------


def draw_masks(out, view, scores, priority, ids_keep, patch):
    """masks.png: views u8 (n, s, s, 3), what a strategy read and returned, and what the encoder sees.

    scores {name: (n, N), of parts (n, N, parts)}; priority (n, N), of which the highest are hidden.
    """
    maps = guidance.as_pictures({**scores, "score + noise": priority})
    view, ids_keep = view[:8], ids_keep[:8]
    # What is painted are the visible patches: with --mask ...:throw=0.4, others are not all hidden ones.
    seen = put_patches(torch.full_like(view, GRAY), ids_keep, patch_bytes(view, ids_keep, patch))
    lines = [("view", view), *maps.items(), ("seen", seen)]
    from common import plots  # matplotlib takes a second to load

    plots.image_grid(out / "masks.png", f"What the last batch hid: {out.name}", lines)


def draw_run(out, model, held, target_options, autocast):
    """curves.png and recon.png of a run."""
    from common import plots

    split = held["header"].get("split", "val")
    plots.curves(out / "curves.png", read_log(out / "log.jsonl"), split, out.name)
    n, ours, neighbours = mean_psnr(model, held, target_options, autocast)
    title = (
        f"Pictures that it never trained on, {EVAL_RATIO:.0%} hidden at random. "
        f"PSNR of hidden patches, mean of {n} pictures:\n"
        f"{ours:.1f} dB predicted, {neighbours:.1f} dB with the mean colour of visible neighbours"
    )
    rows = reconstruct(model, held, target_options, autocast)
    plots.image_grid(out / "recon.png", title, rows)


def hide(view, ids, patch):
    """view u8 (B, s, s, 3) with patches ids (B, M) painted gray."""
    return put_patches(view, ids, view.new_full((*ids.shape, 3 * patch * patch), GRAY))


@torch.no_grad()
def filled_in(model, target_options, view, ids_keep, ids_mask, autocast=contextlib.nullcontext):
    """view u8 (B, s, s, 3) with predicted patches, and where they are (B, s, s).

    target_options: {"norm_pix", "floor"}, what the model predicts. norm_pix is undone by predicted
    statistics alone: the true ones would tell the answer.
    """
    pred, stats = predict(model, view, ids_keep, ids_mask, autocast, target_options["floor"])
    pixels = to_pixels(pred, stats if target_options["norm_pix"] else None)
    where = put_patches(torch.zeros_like(view), ids_mask, torch.ones_like(pixels))[..., 0] > 0
    return put_patches(view, ids_mask, pixels), where


def neighbours_in(view, ids_keep, ids_mask, patch):
    """The baseline of `filled_in`: each hidden patch gets one colour, the mean of visible neighbours."""
    # A patch's own mean colour would be a dishonest baseline: the network can't see it either. Its
    # neighbours it sees, and blurring them needs no learning. So what is better than this was learned.
    g = view.shape[2] // patch
    B, K = ids_keep.shape
    visible = masked_patch_gather(view, ids_keep, patch)  # (B, K, p*p*3)
    colours = visible.view(B, K, patch * patch, 3).mean(2)  # (B, K, 3)
    colours = mean_of_neighbours(colours, ids_keep, ids_mask, g)  # (B, M, 3)
    return put_patches(view, ids_mask, to_pixels(colours.repeat(1, 1, patch * patch)))


def psnr(a, b, where):
    """Peak signal-to-noise ratio in dB, (n,), of u8 pictures a, b (n, s, s, 3) where (n, s, s) is true.

    10 log10(255^2 / mean squared error); nan where no pixel is true.
    """
    a, b, where = a.cpu(), b.cpu(), where.cpu()  # Metal has no float64
    error = (a.double() - b.double()).square().mean(3)
    return 10 * torch.log10(255**2 * where.sum((1, 2)) / (error * where).sum((1, 2)))


@torch.no_grad()
def mean_psnr(model, split, target_options, autocast=contextlib.nullcontext):
    """Number of pictures, and the mean PSNR of their hidden patches in dB: predicted, and neighbours'."""
    scores = []
    for view, ids_keep, ids_mask in masked_views(model, split, EVAL_IMAGES):
        pasted, where = filled_in(model, target_options, view, ids_keep, ids_mask, autocast)
        blurred = neighbours_in(view, ids_keep, ids_mask, model.config["patch_size"])
        scores.append(torch.stack([psnr(x, view, where) for x in (pasted, blurred)]))
    scores = torch.cat(scores, 1)  # (2, n)
    # A blank picture is filled in exactly, and its PSNR is infinite.
    scores = scores[:, scores.isfinite().all(0)]
    return scores.shape[1], *scores.mean(1).tolist()


@torch.no_grad()
def reconstruct(model, split, target_options, autocast=contextlib.nullcontext):
    """[(name, u8 (8, s, s, 3))] of eight images, as they are and as they are filled in."""
    patch = model.config["patch_size"]
    view, ids_keep, ids_mask = next(masked_views(model, split, 8))
    pasted, where = filled_in(model, target_options, view, ids_keep, ids_mask, autocast)
    return [
        ("original", view),
        ("what the\nencoder sees", hide(view, ids_mask, patch)),
        ("predicted\npatches", torch.where(where[..., None], pasted, GRAY)),
        ("both together", pasted),
        (
            "baseline: mean\ncolour of visible\nneighbours",
            neighbours_in(view, ids_keep, ids_mask, patch),
        ),
    ]
