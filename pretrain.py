"""Stage 2: masked pre-training. A ViT learns anime images by predicting hidden patches.

    python pretrain.py --mask attn_high --ratio 0.75
    python pretrain.py --contrast none --flat-weight 1                 plain MAE: random masks, no more
    python pretrain.py --resume runs/NAME
    torchrun --nproc-per-node 8 pretrain.py --mask attn_high --ratio 0.75       (a GPU each)

Reads:  datasets/NAME (drawn or packed first if it is not there), maps/NAME (apps/maps.py makes them)
Writes: runs/NAME/ state.pt (what a resumed run needs), model.safetensors (encoder, decoder, and the
        pooler, whose attention can guide masks), log.jsonl, pictures

What still differs from MAE in the plain one: the floor of norm_pix (kernels/patches.py), a narrow decoder
and the size of first weights (model.py), crops of 0.4 of the area or more, and a clipped gradient.

Random numbers are drawn on the CPU from (seed, epoch, step, process). So two masks with one seed see
the same images with the same crops. On a CPU, a run resumed by the same code ends with the same bits.

    b images of a step, of one process   m of them have a second view (guidance.py)
    S side of a stored image   s side of a view   p side of a patch, which has p*p*3 numbers
    N patches of a view   K visible   M hidden   D width of the encoder   P = p*p*3
"""

import argparse
import datetime
import functools
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn

import data
import mask as masking
from common import guidance, train
from common.checkpoints import POOLER, STATS_HEAD, init_from, save_network
from common.evaluate import draw_masks, draw_run, evaluate
from common.train import (
    Parser,
    UserError,
    at_least,
    between,
    cli,
    parse_keys,
    quoted,
    refuse_useless,
    run_name,
    set_defaults,
)
from kernels import patches
from kernels.patches import (
    FLOOR,
    absolute_error,
    detail_weight,
    masked_patch_gather,
    patch_detail,
    predicted_stats,
    reconstruction_error,
    squared_error,
    stats_loss,
    weighted_mean,
)
from model import MAE, SIZES, pooler_of

WEIGHT_DECAY = 0.05  # of AdamW, as in MAE
CLIP = 1.0  # largest norm of the gradient: a run of minutes has no time to recover from a jump
# Beginnings of names: weights whose losses are not the MAE's, so that their gradients are not clipped with
# its own. Add yours here.
UNCLIPPED = (POOLER, STATS_HEAD)
# On an M1 or M2, torch 2.13 adds up 32,767 rows or more wrongly, as the gradient of a weight does over
# all tokens of a step (github.com/pytorch/pytorch/issues/177116, 195163).
METAL_ROWS = 32_766
WARMUP = 0.1  # share of the run in which the learning rate rises
SECOND_STREAM = 1  # seeds the second views, so that they change no other random number
OF_SCORES = ("teacher", "attention", "maps")  # flags that only some masks read
WAIT = datetime.timedelta(hours=6)  # the other processes wait while the first packs or evaluates
# What fits the device; views: of a whole run, batch: views of a step. On a CPU, many small steps learn
# more (results/TRIED.md).
GPU = {"model": "small", "blr": 6e-4, "views": 4_000_000, "batch": 512}
CPU = {"model": "nano", "blr": 8e-3, "views": 64_000, "batch": 32}
# About half an hour of a Mac, by a sum: a thousand views cost 2.9 TFLOP, and a third of the 4.3 TFLOP/s is
# reached that an M4 has in fp32. No Mac has run it.
MAC = GPU | {"views": 800_000}
DEFAULTS = {"cpu": CPU, "cuda": GPU, "mps": MAC}
RECIPES = {
    "mae": {"mask": "random", "ratio": "0.75", "contrast": "pooler"},
    "simmim": {"mask": "squares", "ratio": "0.6", "contrast": "none"},
}


# ---- the flags -----------------------------------------------------------------------------------


def parse_flags():
    """The flags as they were given; `settle` gives the others their values."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="datasets/toon", metavar="DIR", help="packed set, or images to pack")
    add("--out", metavar="DIR", help="folder of the run (default: runs/ and the flags given)")
    add("--model", metavar="NAME[:key=value,...]", help=f"{', '.join(SIZES)}; simmim=1: SimMIM")
    add("--init", metavar="PATH", help="start from a run, or from a checkpoint of MAE or DINO")
    add("--mask", metavar="NAME[:key=value,...]", help=", ".join(masking.STRATEGIES))
    add("--ratio", metavar="R", help="share that is not seen; 0.5:0.9 rises during the run")
    add("--teacher", default="self", metavar="self|maps|PATH", help="its attention guides")
    add("--attention", choices=guidance.ATTENTION, help="default: what was trained, else outlier")
    add("--maps", default="auto", metavar="auto|truth|DIR", help="of foreground, parts, attention")
    add("--contrast", metavar="NAME[:key=value,...]", help="pooler, none; cls trains the encoder")
    add("--flat-weight", type=between(0, 1), default=0.1, metavar="W", help="loss of flat patches")
    add("--no-norm-pix", action="store_true", help="predict raw pixels, not normalised patches")
    add("--epochs", type=at_least(1), help="default: by the number of views of the device")
    add("--batch-size", type=at_least(1), metavar="B", help="images of a step, of all processes")
    add("--blr", type=between(1e-9, 10), metavar="LR", help="lr = blr * batch size / 256")
    add("--min-crop", type=between(0.01, 1), default=0.4, metavar="AREA", help="smallest crop")
    add(
        "--eval-every",
        type=at_least(1),
        metavar="EPOCHS",
        help="default: so that a run has 2 to 20",
    )
    train.add_flags(add)
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA, one ratio")
    flags = parser.parse_args()
    unread = {*OF_SCORES} - flags_of_mask(flags)
    if not flags.resume:
        mask = f"--mask {flags.mask}" if flags.mask else "the default mask"
        refuse_useless(flags.given & unread, f"with {mask}")
    train.take_saved_flags(flags)
    set_defaults(flags, out=f"runs/{run_name(flags, Path(flags.data).name)}")
    return flags


def flags_of_mask(flags):
    """Those of OF_SCORES that the strategy of --mask reads: it follows one score, or none."""
    score = masking.NEEDS.get((flags.mask or "random").partition(":")[0])
    if score == "attn":
        return {"teacher", "maps" if flags.teacher == "maps" else "attention"}
    return {"maps"} if score in guidance.MAPS else set()


def parse_model(flags):
    """--model -> is it SimMIM, and the arguments of the network."""
    sizes = {name: size | {"simmim": 0} for name, size in SIZES.items()}
    _, size = parse_keys(flags.model, sizes, "--model")
    return size.pop("simmim") != 0, size


def parse_mask(flags):
    """--mask -> the name of the strategy, and its parameters."""
    keys = masking.PARAMS
    # A trained teacher is worth following at once, and not after a tenth of the run.
    if flags.teacher != "self":
        late = {"start", "ramp_for"}
        keys = {name: own | dict.fromkeys(own.keys() & late, 0.0) for name, own in keys.items()}
    return parse_keys(flags.mask, keys, "--mask")


def ends_of(ratio):
    """ "0.75" -> (0.75, 0.75); "0.5:0.9" -> (0.5, 0.9)."""
    first, _, last = ratio.partition(":")
    return float(first), float(last or first)


def settle(flags, device, rank, world):
    """Give every flag its value: after this, none changes. -> a line on how it computes, and two splits.

    Flags stay the text that they were; parse_model and parse_mask take them apart, here and where they are used.
    The splits are train, and that of the evaluations; pictures are packed first if need be.
    """
    defaults = DEFAULTS[device.type]
    flags.dtype, reason = train.pick_dtype(flags.dtype, device)  # a resumed run keeps it
    set_defaults(flags, model=defaults["model"], blr=defaults["blr"])
    simmim, size = parse_model(flags)
    set_defaults(flags, **RECIPES["simmim" if simmim else "mae"])
    kernels = settle_compiler(flags, device)

    # Network and mask come first: a typo should not wait until pictures are packed.
    contrast, _ = parse_keys(flags.contrast, guidance.SETTINGS, "--contrast")
    if simmim and contrast != "none":
        raise UserError(f"--contrast {contrast}: SimMIM has no contrastive loss; choose none")
    _, params = parse_mask(flags)
    N = (size["image_size"] // max(1, size["patch_size"])) ** 2
    try:
        for ratio in ends_of(flags.ratio):
            masking.kept(N, ratio, params["throw"])
    except (ValueError, OverflowError) as problem:
        raise UserError(f"--ratio {flags.ratio}: {problem}") from None

    if rank == 0:
        flags.data = str(data.open_or_pack(flags.data, size["image_size"]))
    if world > 1:
        distributed.barrier()
        flags.data = str(data.open_or_pack(flags.data, size["image_size"]))
    splits = data.open_split(flags.data, "train"), data.open_split(flags.data, flags.split)

    set_length(flags, len(splits[0]["images"]), N, device, world)
    return f"{flags.dtype}: {reason}; {kernels}", splits


def settle_compiler(flags, device):
    """--compile, and who computes what kernels/ has -> a line that says so. All is compiled, or nothing is."""
    # Where the ratio changes, so do the shapes, and each new one would be compiled.
    set_defaults(flags, compile=device.type == "cuda" and ":" not in flags.ratio)
    why_not = patches.why_not_triton(device) if device.type == "cuda" else None
    if why_not:  # a GPU's programs are all made by Triton, those of torch.compile, too
        flags.compile = False
    if device.type == "cuda" and not flags.compile:
        patches.IMPL = "torch"
    line = f"kernels in {patches.choose_impl('auto', device)}"
    if flags.compile:
        return f"{line}; compiling, a minute or more (--no-compile begins at once)"
    return line + (f": {why_not}" if why_not else "")


def set_length(flags, n, N, device, world):
    """Batch size, epochs and evaluations, for n training images of N patches: as many views for few as for many."""
    defaults = DEFAULTS[device.type]
    batch = defaults["batch"]
    while device.type == "mps" and batch * (N + 1) > METAL_ROWS:
        batch //= 2
    set_defaults(flags, batch_size=batch)
    b = min(flags.batch_size, n) // world  # images of one process
    # The contrastive loss compares images, and with shuffle=1 one takes the map of another.
    if b < 2:
        raise UserError(f"--batch-size {flags.batch_size}: {b} a process are too few; raise it")
    flags.batch_size = b * world
    views = n // flags.batch_size * flags.batch_size  # of an epoch: some images fill no batch
    set_defaults(flags, epochs=max(1, round(defaults["views"] / views)))
    # An evaluation of the demo set takes about as long as an epoch, so there are five epochs or more
    # between two. Only a shorter run has one in its middle.
    every = min(max(5, flags.epochs // 16), (flags.epochs + 1) // 2)
    set_defaults(flags, eval_every=every)


# ---- several processes, each with a GPU and with other views --------------------------------------


def start_processes(device):
    """The number of this process, how many torchrun started, and this one's device."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:  # one alone, whoever started it
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    if distributed.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return distributed.get_rank(), world, device


def average_gradients(modules):
    """All processes take the same step: that of the mean of their gradients."""
    # DistributedDataParallel would do it during the backward pass, a little faster. But it wants to know
    # every weight from the start, and in each step a gradient of every weight; the pooler has none in half
    # of the steps. So here it is written out.
    grads = [p.grad for p in modules.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


# ---- the loss ------------------------------------------------------------------------------------


def masked_loss(
    pred,
    stats,
    view,
    visible_stats,
    ids_keep,
    ids_mask,
    patch,
    flat_weight,
    error_of,
    target_options,
):
    """The loss of the MAE, that of the patches' statistics, and the error of each hidden patch (b, M).

    pred (b, M, P) and stats (b, M, 2) are the network's, view u8 (b, s, s, 3), visible_stats (b, K, 2),
    ids_keep (b, K), ids_mask (b, M); target_options: {"norm_pix", "floor"}, what is predicted.
    """
    error, hidden_stats = reconstruction_error(  # (b, M), (b, M, 2)
        pred, view, ids_mask, patch, **target_options, error_of=error_of
    )
    # A drawing is mostly flat colour, which is easy to predict, so it weighs little.
    weight = detail_weight(patch_detail(view, ids_mask, patch), flat_weight)  # (b, M)
    loss = weighted_mean(error, weight)
    # norm_pix normalises the target, so pred lacks each patch's mean and standard deviation, but a
    # picture needs them. They are estimated from visible neighbours, and stats corrects the
    # estimate. Its head reads detached features, so it changes nothing else.
    g = view.shape[1] // patch  # patches of a row of the view
    predicted = predicted_stats(stats, visible_stats, ids_keep, ids_mask, g)
    return loss, stats_loss(predicted, hidden_stats), error.detach()


# ---- the loop ------------------------------------------------------------------------------------


def build_model(flags):
    """The network, its weights drawn from --seed or read from --init."""
    simmim, size = parse_model(flags)
    kind = MAE
    if simmim:
        from common.variants import SimMIM as kind
    torch.manual_seed(flags.seed)
    try:
        model = kind(**size)
    except ValueError as problem:  # sizes that do not fit each other
        raise UserError(f"--model {flags.model}: {problem}") from None
    if flags.init and not flags.resume:
        print(f"init     {init_from(model, flags.init)}")
    return model


def build_contrast(flags, encoder, train_set):
    """The contrastive loss, or None; for `pooler` the encoder gets the pooler that it trains."""
    name, settings = parse_keys(flags.contrast, guidance.SETTINGS, "--contrast")
    if not settings:
        return None
    # Its random numbers are drawn aside: with and without it, all other weights begin alike.
    with torch.random.fork_rng(devices=[]):
        if name == "pooler":
            encoder.pooler = pooler_of(encoder)
        # Foreground masks u8 (n, S, S), or None: second views get the background of another image.
        figures = data.resident(train_set.get("fg"), encoder.device)
        return guidance.Contrast(encoder, settings, train_set, figures, flags.min_crop)


def main():
    flags = parse_flags()
    rank, world, device = start_processes(train.pick_device(flags.device))
    how, (train_set, held_set) = settle(flags, device, rank, world)
    dtype = train.DTYPES[flags.dtype]
    autocast = train.autocast_of(device, flags.dtype)

    model = build_model(flags).to(device)
    encoder = model.encoder
    s, p, N = encoder.image_size, encoder.patch_size, encoder.side**2
    images = data.resident(train_set["images"], device)  # on the GPU, if it has room for them
    # The contrastive loss comes first, because the teacher of a guide is a copy of the encoder, pooler included.
    contrast = build_contrast(flags, encoder, train_set)
    mask_name, params = parse_mask(flags)
    throw, shuffle = params.pop("throw"), params.pop("shuffle", 0) > 0
    score, start = masking.NEEDS.get(mask_name), params.get("start", masking.START)
    guide = guidance.make_guide(score, flags, encoder, train_set, autocast, start, shuffle)
    strategy = functools.partial(masking.STRATEGIES[mask_name], **params)

    b = flags.batch_size // world  # images of a step, in this process
    per_epoch = (
        len(images) // flags.batch_size
    )  # steps: what fills no batch waits for another epoch
    total = flags.epochs * per_epoch
    # Twice the batch means half the steps, so the learning rate grows with it, as in MAE's code (after
    # Goyal et al. 2017, for SGD). With AdamW this is too much: in short runs, four times the batch
    # wanted less than four times the rate (results/TRIED.md).
    peak_lr = flags.blr * flags.batch_size / 256
    # All that learns has one optimizer. The average of the encoder has no gradients, so it is left alone.
    modules = nn.ModuleDict({"model": model, "guide": guide})
    if contrast:
        modules["contrast"] = contrast
    modules.to(device)
    optimizer = train.make_optimizer(modules, peak_lr, WEIGHT_DECAY)
    # Of the model, all but the pooler and the head of the statistics is clipped, and of the rest nothing. Their
    # gradients have another size: in one norm they would shrink the step of the encoder.
    clipped = [w for name, w in model.named_parameters() if not name.startswith(UNCLIPPED)]

    target_options = {"norm_pix": not flags.no_norm_pix, "floor": FLOOR}
    error_of = squared_error if isinstance(model, MAE) else absolute_error  # the latter is SimMIM's
    loss_of = functools.partial(
        masked_loss,
        patch=p,
        flat_weight=flags.flat_weight,
        error_of=error_of,
        target_options=target_options,
    )
    # What a compiler makes faster: the network, the encoder that reads second views, the loss, and the cut.
    # The model itself stays plain, because evaluations and the teacher come in other shapes.
    network, encode, cut_views = model, encoder, data.view_images
    if flags.compile:
        # A GPU starts the kernels of a whole pass as one recording. A step of an earlier
        # loop took 19 instead of 33 ms (results/TRIED.md); no card has run this one.
        mode = "reduce-overhead" if device.type == "cuda" else None
        network, encode, loss_of = (torch.compile(f, mode=mode) for f in (network, encode, loss_of))
        cut_views = torch.compile(cut_views)

    count = sum(w.numel() for w in model.parameters()) / 1e6
    print(
        f"machine  {train.machine(device)}\n"
        f"         {how}\n"
        f"data     {flags.data}: {len(images)} train, {len(held_set['images'])} {flags.split} images\n"
        f"model    {flags.model}: {count:.1f} M parameters, {N} patches\n"
        f"recipe   {flags.batch_size * total:,} views: {total:,} steps of {flags.batch_size}, learning rate "
        f"{peak_lr:.2g} (blr {flags.blr:g})\n"
        f"         crops from {flags.min_crop:g} of the area, contrast {flags.contrast}, flat weight "
        f"{flags.flat_weight:g}\n"
        f"run      {flags.out}: {flags.mask}, ratio {flags.ratio}, seed {flags.seed}, {flags.epochs} "
        f"epochs, an evaluation every {flags.eval_every}"
    )
    run = train.Run(flags, {**modules, "optimizer": optimizer}, total, per_epoch, device)
    run.resume_or_begin()
    splits = train_set, held_set
    # The first row of the log is that of step 0: what a network of random weights can do.
    if run.writes and run.step == 0:
        run.log(**evaluate(model, guide, flags, splits, target_options, autocast, 0))
    pairs = None  # the contrastive loss, and the share of pairs found, in the last step that had it
    unordered = torch.zeros((), device=device)  # priorities that are no numbers, in all steps

    for epoch in range(run.step // per_epoch, flags.epochs):
        if epoch in guide.epochs and run.step == epoch * per_epoch:
            guide.make_maps(guide.teacher, train_set["images"], autocast)
        # Every process goes through the same order, and takes each world-th image of it.
        order = data.epoch_order(len(images), flags.seed, epoch)[: per_epoch * b * world]
        order = order[rank::world]
        # A resumed run may begin within an epoch: it skips the batches that it has seen.
        for index, batch in data.batches(images, order, b, device, run.step % per_epoch):
            # 1. view: a crop of each image
            # index (b,): numbers of the images; batch u8 (b, S, S, 3): whole images, as stored.
            # Crops, flips and noise are drawn on the CPU from these four, so that a GPU and a laptop
            # see the same crops, and a resumed run sees those that it would have seen.
            stream = (flags.seed, epoch, run.step, rank)
            generator = train.seeded(*stream)
            boxes, flip = data.draw_boxes(b, generator, flags.min_crop)
            noise = masking.gumbel_noise(b, N, generator)
            boxes, flip, noise = (data.send(x, device) for x in (boxes, flip, noise))
            view = cut_views(batch, boxes, flip, s)  # (b, s, s, 3)
            # Colours may be changed here: data.jitter_colour(view, torch.rand(b, 3, generator=generator),
            # 0.3). What moves pixels would have to move the scores below, too.

            # 2. mask: which patches are hidden
            t = run.step / total  # progress of the run: a curriculum depends on it
            first, last = ends_of(flags.ratio)
            K = masking.kept(N, first + (last - first) * t)
            thrown = round(throw * N)  # patches that are neither seen nor predicted
            M = N - K - thrown
            # {name: (b, N)}; of parts, a share for each; and the view, for strategies that read pixels
            scores = guide.scores(index, boxes, flip, view, autocast)
            # The noise alone would be random masking: a strategy decides how far a score may overrule it.
            priority = strategy(scores, noise, t, M)  # (b, N): the highest M are hidden
            ids_keep, ids_mask = masking.sample(priority, K, thrown)  # (b, K), (b, M)

            # 3. gather: the visible patches alone
            # An MAE is cheap because its encoder reads nothing else (SimMIM reads all).
            # visible (b, K, p*p*3), and mean and log std of each (b, K, 2)
            visible, visible_stats = masked_patch_gather(
                view, ids_keep, p, dtype, return_stats=True, floor=FLOOR
            )

            # 4. network
            with autocast():
                # pred (b, M, p*p*3), stats (b, M, 2), tokens (b, 1+K, D), which SimMIM lacks
                pred, stats, tokens = network(visible, ids_keep, ids_mask)

            # 5. loss of the reconstruction, and that of the statistics; errors (b, M) of hidden patches
            mae_loss, side_loss, errors = loss_of(
                pred, stats, view, visible_stats, ids_keep, ids_mask
            )
            # For --mask learned, a small network learns to predict these errors; else it is 0.
            loss = mae_loss + side_loss + guide.loss(ids_mask, errors)

            # 6. contrastive loss: does the pooler, or the CLS token, find the other view of an image?
            if contrast and run.step % contrast.settings["every"] == 0:
                # A seed of its own: with and without this loss, the MAE sees the same crops.
                generator = train.seeded(*stream, SECOND_STREAM)
                second_view, second_ids = contrast.second_views(batch, index, K, generator)
                # Of the m second views only the tokens are needed, so the encoder runs alone.
                second_visible = masked_patch_gather(second_view, second_ids, p, dtype)
                with torch.set_grad_enabled(contrast.trains_encoder), autocast():
                    second_tokens = encode(second_visible, second_ids)  # (m, 1+K, D)
                contrastive, pairs = contrast(tokens, second_tokens, index)
                loss = loss + contrastive

            # 7. backward
            # All losses share one pass. Beside the MAE's, only --contrast cls reaches the encoder.
            loss.backward()
            if world > 1:
                average_gradients(modules)

            # 8. update
            grad_norm = nn.utils.clip_grad_norm_(clipped, CLIP)
            lr = train.lr_at(run.step, total, WARMUP * total, peak_lr)
            train.set_lr(optimizer, lr)
            optimizer.step()
            optimizer.zero_grad()
            guide.update_teacher(encoder, run.step, total)
            # The log's loss is that of the MAE alone. From here on, run.step counts this step, too.
            run.update(mae_loss, grad_norm)
            # What the step has made is let go before the next one makes its own: on a CPU, memory that was just
            # in use is a few percent of a step faster.
            del visible, visible_stats, pred, stats, tokens, side_loss, loss

            # 9. log, evaluate, save
            unordered += (~priority.isfinite()).sum()
            if run.logs_now:
                # With one infinite score, the same patches would be hidden in every step, and the loss
                # would look healthy.
                problem = f"--mask {flags.mask}: {unordered:g} priorities are not finite"
                assert unordered == 0, problem
                numbers = {"lr": lr}
                if pairs is not None:
                    numbers["contrastive_loss"], numbers["pairs_found"] = pairs.tolist()
                run.log_step(**numbers)
            if run.writes and (run.step % (per_epoch * flags.eval_every) == 0 or run.step == total):
                draw_masks(run.out, view, scores, priority, ids_keep, p)
                run.log(
                    **evaluate(
                        model, guide, flags, splits, target_options, autocast, run.step / per_epoch
                    )
                )
            run.save_if_due()  # at most every two minutes, behind a row; after Ctrl-C, it exits here

    if run.writes:
        notes = {"step": run.step, "commit": run.commit, "run": run.config, **target_options}
        save_network(model, run.out / "model.safetensors", notes)
        draw_run(run.out, model, held_set, target_options, autocast)
        print(f"wrote    {run.out}: model.safetensors and pictures, after {run.seconds():.0f} s")
        print(f"next: python probe.py {quoted(run.out)}")


if __name__ == "__main__":
    cli(main)
