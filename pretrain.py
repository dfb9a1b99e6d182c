"""Stage 2: masked pre-training. A ViT learns anime images by predicting the patches that a mask hides from it.

    python pretrain.py --mask attn_high --ratio 0.75
    torchrun --nproc-per-node 8 pretrain.py --mask attn_high --ratio 0.75      # the same run on 8 GPUs

Reads:  datasets/NAME (the demo set is drawn if it is not there; a folder or zip of images is packed first);
        maps/NAME for the masks that need figure or parts (maps.py makes them)
Writes: runs/NAME/ state.pt (all that a resumed run needs), model.safetensors (the weights, for the next stages),
        log.jsonl, curves.png, recon.png, masks.png, and snapshots/ if asked

Everything random is drawn on the CPU from (seed, epoch, step): two strategies with one seed see the same images in the
same order with the same crops, and a run that was killed and resumed ends with the same bits as one that was not.
Several processes draw the same and take a slice each: --batch-size is that of all, and the losses are those of one.
"""

import argparse
import functools
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
import kernels
import mask as masking
from common import distributed, guidance, plots
from common.checkpoints import init_from, load_exactly, save_model
from common.evaluate import (
    attention_by_part,
    draw_reconstructions,
    hide,
    masked_mse,
    pooled_tokens,
    recognition,
    thumbnails,
)
from common.io import UserError, cli, send
from common.train import (
    Pacer,
    Stopwatch,
    autocast_of,
    catch_signals,
    lr_at,
    machine,
    make_optimizer,
    open_log,
    open_run,
    peak_memory_mb,
    pick_device,
    pick_dtype,
    read_log,
    save_state,
    seeded,
)
from kernels.gather import masked_patch_gather
from kernels.loss import absolute_loss, detail_weight, patch_detail, reconstruction_loss, stats_loss, visible_stats
from model import MAE, SIZES, Block, SimMIM

WEIGHT_DECAY, CLIP = 0.05, 1.0
LOG_EVERY = 10  # steps
DEFAULTS = {  # what is not given; on a CPU many small steps learn more than few large ones (results/LOG.md)
    "cpu": dict(model="nano", epochs=32, batch_size=32, blr=8e-3),
    "gpu": dict(model="small", epochs=200, batch_size=512, blr=6e-4),
}


# fmt: off
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument_group("what to learn from, and where to write").add_argument
    add("--data", default="datasets/toon", metavar="DIR", help="packed set, or images to pack (default: the demo set)")
    add("--out", metavar="DIR", help="run folder (default: runs/ and the flags that matter)")
    add("--resume", action="store_true", help="go on with the run in --out, from its last checkpoint")
    add = parser.add_argument_group("network").add_argument
    add("--model", choices=SIZES, help="default: small on a GPU, nano on a CPU")
    add("--image-size", type=int, metavar="PX", help="side of a view in pixels (default: per model, 96 or 128)")
    add("--patch-size", type=int, metavar="PX", help="side of a patch in pixels (default: per model, 8 or 16)")
    add("--decoder-dim", type=int, metavar="W", help="width of the decoder (default: per model, 128 or 256)")
    add("--decoder-depth", type=int, default=2, metavar="N", help="blocks of the decoder")
    add("--init", metavar="PATH", help="start from these weights: a run, or a checkpoint of MAE or DINO")
    add = parser.add_argument_group("mask and loss").add_argument
    add("--mask", default="random", metavar="NAME[:key=value,...]", help=f"one of {', '.join(masking.STRATEGIES)}")
    add("--ratio", metavar="R", help="share of patches hidden; .5:.9 is a schedule (default: .75, simmim .6)")
    add("--teacher", default="self", metavar="self|maps|PATH",
        help="whose attention guides: its own average, the maps of --maps, a run, a checkpoint of MAE or DINO")
    add("--attention", choices=guidance.SOURCES,
        help="of the CLS token, of all patches, or unusual tokens\n(default: unusual; cls for a checkpoint file)")
    add("--maps", default="auto", metavar="auto|truth|DIR",
        help="figure and parts: by maps.py, or the data's own masks (auto: maps/NAME if it is there, else its own)")
    add("--flat-weight", type=float, default=0.1, metavar="W", help="weight of a flat patch in the loss; 1: plain MAE")
    add("--no-norm-pix", action="store_true", help="predict raw pixels instead of each patch's contrast")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, help="passes over the data (default: per device)")
    add("--batch-size", type=int, metavar="B", help="images for one optimizer step (default: per device)")
    add("--accumulate", type=int, default=1, metavar="N", help="split each batch into N parts that fit in memory")
    add("--blr", type=float, metavar="LR", help="base learning rate: lr = blr * batch / 256 (default: per device)")
    add("--warmup", type=float, default=0.1, metavar="SHARE", help="share of the run in which the rate rises")
    add("--min-crop", type=float, default=0.4, metavar="AREA", help="smallest share of an image that a crop shows")
    add("--seed", type=int, default=0, help="of weights, order, crops and masks")
    add("--eval-on", default="val", choices=["val", "dev", "test"], help="split that evaluations look at")
    add("--eval-every", type=int, metavar="EPOCHS", help="between evaluations (default: a third, at most 10)")
    add("--every", type=int, default=0, metavar="EPOCHS", help="keep the weights so often, in snapshots/ (0: never)")
    add("--log", default="", metavar="NAMES", help="tensorboard,wandb beside log.jsonl")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    add("--impl", default="auto", choices=["auto", "torch", "triton"], help="of the two kernels")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--recompute", action="store_true", help="activations again in the backward pass: less memory, a third slower")
    return parser.parse_args()
# fmt: on


def fill_defaults(args, device, dtype):
    """What was not given depends on the machine, and the sizes on the model."""
    args.dtype = "fp32" if dtype == torch.float32 else "bf16"
    given = {k: v for k, v in vars(args).items() if v is not None}
    vars(args).update(DEFAULTS["cpu" if device.type == "cpu" else "gpu"] | given)
    size = {k: SIZES[args.model][k] for k in ("image_size", "patch_size", "decoder_dim")}
    vars(args).update(size | given | {"eval_every": given.get("eval_every", min(10, max(1, args.epochs // 3)))})
    args.attention = args.attention or guidance.usual_source(args.teacher)
    args.ratio = args.ratio or ("0.6" if args.mask.startswith("simmim") else "0.75")


def check(args):
    """Every mistake that can be seen before anything is read or written."""
    at_least_one = ("image_size", "patch_size", "decoder_depth", "epochs", "batch_size", "accumulate", "eval_every")
    for name in at_least_one:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    for name, low, high in (("flat_weight", 0, 1), ("warmup", 0, 1), ("min_crop", 0.01, 1), ("blr", 1e-9, 10)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must lie between {low} and {high}")
    if args.every < 0:
        raise UserError(f"--every {args.every} must be 0 (no snapshots) or a number of epochs")
    if args.seed < 0 or not args.data:
        raise UserError(f"--seed {args.seed} must be 0 or more" if args.seed < 0 else "--data is empty: give a folder")
    if args.batch_size % args.accumulate:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of --accumulate {args.accumulate}")
    try:
        strategy, params = masking.parse_mask(args.mask)
        ratios = masking.parse_ratio(args.ratio)
        for ratio in ratios:
            masking.kept((args.image_size // args.patch_size) ** 2, ratio)
    except ValueError as problem:
        raise UserError(problem) from None
    if args.teacher != "self" and masking.NEEDS.get(strategy) == "attn":
        params = {"start": 0.0, "ramp_for": 0.0} | params  # a finished teacher needs no time to grow up
    return strategy, params, ratios


def use_impl(name, device):
    """Set what "auto" means to the kernels -> (implementation, the reason)."""
    kernels.default = name
    try:
        return kernels.choose_impl("auto", device)
    except ValueError as problem:
        raise UserError(problem) from None


def run_name(args, folder):
    words = [folder.name, args.model, args.mask.replace(":", "-").replace(",", "-"), args.ratio.replace(":", "-")]
    words += [] if args.flat_weight == 0.1 else [f"flat{args.flat_weight:g}"]
    words += ["raw"] if args.no_norm_pix else []
    words += [] if args.teacher == "self" else ["by-" + Path(args.teacher).name]
    words += [] if args.init is None else ["from-" + Path(args.init).name]
    words += [] if args.attention == guidance.usual_source(args.teacher) else [args.attention]
    words += [] if args.maps == "auto" else [Path(args.maps).name]
    return "-".join([*words, f"s{args.seed}"])


def config_of(args, folder):
    """The flags that decide the weights: a run can only be resumed under the same."""
    leave_out = ("out", "resume", "log", "device", "compile", "recompute", "impl", "eval_every", "eval_on", "every")
    return {k: v for k, v in vars(args).items() if k not in leave_out} | {"data": str(folder)}


def as_map(known, side):
    """What guided the mask, (n, N) or (n, N, P) shares of parts -> pictures (n, side, side)."""
    return (known.argmax(2) if known.dim() == 3 else known).unflatten(1, (side, side))


# ---- the run -------------------------------------------------------------------------------------------------------


def main():
    args = parse_args()
    device = pick_device(args.device)
    dtype, dtype_why = pick_dtype(args.dtype, device)
    autocast = autocast_of(device, dtype)
    fill_defaults(args, device, dtype)
    strategy, params, ratios = check(args)
    impl, impl_why = use_impl(args.impl, device)
    rank, world, device = distributed.join(device)

    # the data, the network, and the run folder
    torch.manual_seed(args.seed)
    size = {k: SIZES[args.model][k] for k in ("dim", "depth", "heads")}
    build = SimMIM if strategy == "simmim" else MAE
    model = build(args.image_size, args.patch_size, **size,
                  decoder_dim=args.decoder_dim, decoder_depth=args.decoder_depth)  # fmt: skip
    with distributed.zero_first():
        folder = data.open_or_pack(args.data, args.image_size)
    train, held = data.open_split(folder, "train"), data.open_split(folder, args.eval_on)
    out = Path(args.out or f"runs/{run_name(args, folder)}")
    S, p, N, norm_pix = args.image_size, args.patch_size, model.encoder.side**2, not args.no_norm_pix
    B = min(args.batch_size, len(train["images"]) // args.accumulate * args.accumulate)
    if B == 0:
        raise UserError(f"{folder} has {len(train['images'])} training images, --accumulate needs {args.accumulate}")
    if B % (world * args.accumulate):
        parts = world * args.accumulate
        can = next((n for n in (-(-B // parts) * parts, B // parts * parts) if 0 < n <= len(train["images"])), None)
        mend = f"--batch-size {can} can" if can else f"{folder} has {len(train['images'])}: use fewer processes"
        raise UserError(f"a batch of {B} images can't be shared by {world} processes in {args.accumulate} parts each; "
                        f"{mend}")  # fmt: skip
    b = B // world
    mine = slice(rank * b, rank * b + b)  # this process's part of every batch
    per_epoch, peak_lr = len(train["images"]) // B, args.blr * B / 256
    total = per_epoch * args.epochs

    # network, optimizer, and what guides the mask
    took = init_from(model, args.init) if args.init and not (out / "state.pt").exists() else None
    guide = guidance.Guide(strategy, params, args, model, folder, train, device, autocast)
    config = config_of(args, folder) | {"images": len(train["images"]), "guide": guide.what}
    state = open_run(out, config, args.resume)
    model.to(device)
    for block in (m for m in model.modules() if isinstance(m, Block)):
        block.recompute = args.recompute
    net = torch.compile(model) if args.compile else model
    learning = torch.nn.ModuleDict({"model": model, **guide.networks})  # a teacher has no gradient, and is left out
    optimizer = make_optimizer(learning, peak_lr, WEIGHT_DECAY)
    clipped = [w for name, w in model.named_parameters() if "stats_head" not in name]

    step, seconds = 0, 0.0
    if state:
        load_exactly(model, state["model"], out / "state.pt")
        guide.load(state, out / "state.pt")
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    log = open_log(out / "log.jsonl", step if state else -1, args.log, config, write=rank == 0)

    print(f"machine  {machine(device)}{f', {world} processes' if world > 1 else ''}\n"
          f"         {args.dtype}: {dtype_why}; kernels in {impl}: {impl_why}")  # fmt: skip
    print(f"data     {folder}: {len(train['images'])} train, {len(held['images'])} {args.eval_on} images, "
          f"{len(train['header']['classes'])} classes")  # fmt: skip
    print(f"model    {args.model}: {sum(w.numel() for w in clipped) / 1e6:.1f} M parameters, {S} px in {N} patches of "
          f"{p} px, {masking.kept(N, ratios[0])} of them visible")  # fmt: skip
    for word, line in (("init", took), ("guide", guide.what)):
        print(f"{word:8} {line}\n" if line else "", end="")
    print(f"run      {out}: {args.mask}, {args.epochs} epochs of {per_epoch} steps of {B} images, "
          f"learning rate {peak_lr:.2g}" + (f"; going on from step {step}" if state else ""))  # fmt: skip

    def clock():
        return seconds + time.perf_counter() - began

    def save():
        if rank > 0:
            return
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **guide.state()}
        save_state(state | {"config": config, "step": step, "seconds": clock()}, out / "state.pt")
        for old in set(out.glob("attn-*.safetensors")) - {out / str(guide.file)}:
            old.unlink()

    def about():
        return {"step": step, "run": config, "norm_pix": norm_pix}

    def report():
        if rank > 0:
            return
        row = {"step": step, "epoch": step / per_epoch, "val_mse": masked_mse(model, held, norm_pix, autocast)}
        text = f"epoch {row['epoch']:<4g} {args.eval_on} masked MSE {row['val_mse']:.4f}"
        if data.has_labels(train) and data.has_labels(held):
            row |= recognition(functools.partial(pooled_tokens, model.encoder, S, autocast), train, held)
            text += f", Top-1 kNN {row['knn']:.1f} %, linear {row['linear']:.1f} %"
        elif step == 0:
            text += "; no Top-1: that needs two classes or more, and labels on all images"
        if step == 0 and "knn" in row:
            row |= {f"{k}_thumbnail": v for k, v in recognition(thumbnails, train, held).items()}
            text += f" untrained; thumbnails {row['knn_thumbnail']:.1f} %, {row['linear_thumbnail']:.1f} %"
        if held["header"].get("parts"):
            row["attention_on"] = attention_by_part(guide.networks.get("teacher", model.encoder), S, autocast, held,
                                                    args.attention)  # fmt: skip
        tqdm.write(text)
        log(**row, seconds=round(clock(), 2))

    asked, began = catch_signals(), time.perf_counter()
    if step == 0:
        report()
    images = data.resident(train, device)
    waiting, losses, norms, last_save, view = Stopwatch(), [], [], Pacer(), None
    bar = tqdm(total=total, initial=step, unit="step", disable=True if rank else None)

    for epoch in range(step // per_epoch, args.epochs):
        if step == epoch * per_epoch:
            guide.look(epoch, step, train["images"], out)
        order = data.epoch_order(len(images), args.seed, epoch)
        for rows, batch in waiting.timed(data.batches(images, order, B, device, step % per_epoch, mine)):
            # what is seen and what is hidden; all chance is drawn here, on the CPU, for the whole batch
            t = step / total
            draws = seeded(args.seed, epoch, step)
            boxes, flip = data.draw_boxes(B, draws, args.min_crop)
            noise = masking.gumbel_noise(B, N, draws)
            boxes, flip, noise = (send(x[mine], device) for x in (boxes, flip, noise))
            view = data.view_images(batch, boxes, flip, S)  # u8 (b, S, S, 3)
            K = masking.kept(N, ratios[0] + (ratios[1] - ratios[0]) * t)
            patches = {"masked": N - K} | guide.known(rows, boxes, flip, view, mine)
            ids_keep, ids_mask = masking.sample(masking.STRATEGIES[strategy](patches, noise, t, **params), K)

            # forward and backward, in parts that fit in memory; the weights are shared out over the whole batch
            weight = detail_weight(patch_detail(view, ids_mask, p), args.flat_weight)  # (b, M)
            weight_sum, loss = distributed.all_reduce(weight.sum()), 0.0
            for i in range(0, b, b // args.accumulate):
                part = slice(i, i + b // args.accumulate)
                tokens = masked_patch_gather(view[part], ids_keep[part], p, dtype)
                with autocast():
                    pred, stats = net(tokens, ids_keep[part], ids_mask[part])
                what = (pred, view[part], ids_mask[part], p, weight[part], norm_pix, weight_sum)
                partial, error = absolute_loss(*what) if strategy == "simmim" else reconstruction_loss(
                    *what, return_error=True)  # fmt: skip
                stats = stats + visible_stats(view[part], ids_keep[part], ids_mask[part], p)
                heads = stats_loss(stats, view[part], ids_mask[part], p) + guide.loss(part, ids_mask[part], error)
                (partial + heads / (args.accumulate * world)).backward()  # heads that watch: no gradient for the rest
                loss = loss + partial.detach()

            # step
            guide.learn()
            distributed.all_reduce_gradients(learning.parameters())
            norm = torch.nn.utils.clip_grad_norm_(clipped, CLIP)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total, args.warmup * total, peak_lr)
            optimizer.step()
            optimizer.zero_grad()
            guide.follow(model.encoder, t)
            step += 1
            bar.update()

            # log, evaluate, save
            losses.append(loss)
            norms.append(norm)
            stop = distributed.largest(asked[0] if asked else 0)  # all stop after the same step
            if step % LOG_EVERY == 0 or step % per_epoch == 0 or stop:
                now = torch.stack([distributed.all_reduce(torch.stack(losses)), torch.stack(norms)], 1).cpu()
                losses, norms = [], []
                if not now.isfinite().all():
                    first = step - len(now) + 1 + int((~now.isfinite().all(1)).nonzero()[0])
                    raise UserError(f"the loss is not finite at step {first}; {out}/state.pt keeps the last good "
                                    f"state. Try a smaller --blr than {args.blr:g}, or --dtype fp32")  # fmt: skip
                share, spent = waiting.share()
                about_masks = guide.statistics(patches, ids_mask)
                if warning := guidance.collapsed(about_masks):
                    tqdm.write(f"step {step}: {warning}")
                log(step=step, epoch=round(step / per_epoch, 4), loss=now[:, 0].mean().item(), lr=group["lr"],
                    grad_norm=now[:, 1].mean().item(), images_per_s=round(len(now) * B / spent, 1),
                    data_wait=round(share, 5), memory_mb=round(peak_memory_mb(device)),
                    seconds=round(clock(), 2), **about_masks)  # fmt: skip
                bar.set_postfix(loss=f"{now[:, 0].mean():.4f}")
                if step % (per_epoch * args.eval_every) == 0 or step == total:
                    report()
                if args.every and step % (per_epoch * args.every) == 0 and rank == 0:
                    save_model(model, out / f"snapshots/encoder-{epoch + 1:04d}.safetensors", about())
                if stop or step == total or last_save.due():
                    last_save.time(save)
                    waiting.share()
            if stop:
                bar.close()
                distributed.stop_here(stop, step, args.resume)
    bar.close()
    distributed.leave()

    title = f"{args.mask}, ratio {args.ratio}, {args.model}, {folder.name}"
    if view is not None:  # None where a finished run was resumed: its picture is there
        shown = {guide.need: as_map(patches[guide.need][:8], S // p)} if guide.need else {}
        seen = hide(view[:8], ids_mask[:8], p)
        plots.masks(out / "masks.png", view[:8], seen, shown, f"What the last batch hid: {title}")
    save_model(model, out / "model.safetensors", about())
    plots.curves(out / "curves.png", read_log(out / "log.jsonl"), args.eval_on, title)
    draw_reconstructions(model, held, norm_pix, autocast, out / "recon.png")
    print(f"wrote    {out}/model.safetensors, recon.png, curves.png, masks.png after {clock():.0f} s")


if __name__ == "__main__":
    cli(main)
