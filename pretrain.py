"""Stage 2: masked pre-training. A ViT learns anime images by predicting the patches that a mask hides from it.

    python pretrain.py --mask attn_high --ratio 0.75
    # the same run on 8 GPUs
    torchrun --nproc-per-node 8 pretrain.py --mask attn_high --ratio 0.75

Reads:  datasets/NAME (the demo set is drawn if it is not there; a folder or zip of images is packed
        first); maps/NAME for the masks that need foreground or parts (maps.py makes them)
Writes: runs/NAME/ state.pt (all that a resumed run needs), model.safetensors (the weights, for the
next stages),
        stats_head.safetensors (for pictures), pooler.safetensors (where --contrast trains one),
        log.jsonl, curves.png,
        recon.png, masks.png, snapshots/ if asked

All random numbers are drawn on the CPU from (seed, epoch, step): two strategies with one seed, and
as many views of an image, see the same images in the same order with the same crops, and a run that
was killed and resumed ends with the same bits as one that was not. Several processes draw the same
and take a slice each: --batch-size is that of all, and the losses are those of one.
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import functools
import shlex
from pathlib import Path

import torch

import data
import kernels
import mask as masking
from common import distributed, train
from common.agreement import Agreement, parse_contrast
from common.checkpoints import init_from, load_exactly, save_beside, save_model
from common.command import (
    Parser,
    at_least,
    between,
    cli,
    parse_keys,
    progress,
    refuse_file,
    refuse_unused,
)
from common.evaluate import draw_run, evaluate
from common.formats import read_checkpoint
from common.guidance import (
    SOURCES,
    Guide,
    default_source,
    flags_of_teacher,
    is_trained,
    warn_of_collapse,
)
from common.io import UserError
from kernels.gather import masked_patch_gather
from kernels.loss import (
    FLOOR,
    absolute_error,
    detail_weight,
    patch_detail,
    reconstruction_loss,
    stats_loss,
)
from model import MAE, SIZES, Pooler, SimMIM

WEIGHT_DECAY, CLIP = 0.05, 1.0
ERRORS = {"squares": absolute_error}  # every other mask trains with the squared error
UNTRAINED = (
    "nothing trains the attention of this teacher, so it tells little but where a patch is; "
    "--contrast pooler trains it"
)
# What an image is augmented by where two views of it are compared: else light and background, and
# not the character, tell whose view it is. Swapping needs foreground masks.
JITTER, SWAP = 0.3, 0.7
LOG_EVERY = 10  # steps
SNAPSHOT = "snapshots/encoder-{:04d}.safetensors"  # after so many epochs
WRITTEN = (
    "model.safetensors",
    "pooler.safetensors",
    "stats_head.safetensors",
    "*.png",
)  # by a run that was finished
# What is not given. Length and batch are counted in views, which are the same for every mask and
# every data set. On a CPU many small steps learn more than few large ones (results/LOG.md).
DEFAULTS = {
    "cpu": dict(model="nano", blr=8e-3, decoder_depth=1),
    "gpu": dict(model="small", blr=6e-4, decoder_depth=2),
}
VIEWS = {"cpu": 64_000, "gpu": 4_000_000}  # of a run
BATCH_VIEWS = {"cpu": 32, "gpu": 512}  # of a step


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument_group("what to learn from, and where to write").add_argument
    add(
        "--data",
        default="datasets/toon",
        metavar="DIR",
        help="packed set, or images to pack (default: the demo set)",
    )
    add("--out", metavar="DIR", help="run folder (default: runs/ and the flags that matter)")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out, from its last checkpoint",
    )
    add = parser.add_argument_group("network").add_argument
    add("--model", choices=SIZES, help="default: small on a GPU, nano on a CPU")
    add(
        "--image-size",
        type=at_least(1),
        metavar="PX",
        help="side of a view (default: per model, 96 or 128)",
    )
    add(
        "--patch-size",
        type=at_least(1),
        metavar="PX",
        help="side of a patch (default: per model, 8 or 16)",
    )
    add(
        "--decoder-dim",
        type=at_least(1),
        metavar="W",
        help="width of the decoder (default: per model, 128 or 256)",
    )
    add(
        "--decoder-depth",
        type=at_least(1),
        metavar="N",
        help="blocks of the decoder (default: per device, 1 or 2)",
    )
    add(
        "--init",
        metavar="PATH",
        help="start from these weights: a run, or a checkpoint of MAE or DINO",
    )
    add = parser.add_argument_group("mask and loss").add_argument
    add(
        "--mask",
        default="random",
        metavar="NAME[:key=value,...]",
        help=f"one of {', '.join(masking.STRATEGIES)}",
    )
    add(
        "--ratio",
        metavar="R",
        help="share of patches hidden; .5:.9 is a schedule (default: .75, squares .6)",
    )
    add(
        "--teacher",
        default="self",
        metavar="self|maps|PATH",
        help="whose attention guides: its own average, the maps of --maps, a run, a checkpoint of MAE or DINO",
    )
    add(
        "--attention",
        choices=SOURCES,
        help="of the pooler, of the CLS token through all blocks (rollout) or in the last,\n"
        "or outlier: tokens far from the mean of their place (default: what was trained)",
    )
    add(
        "--maps",
        default="auto",
        metavar="auto|truth|DIR",
        help="foreground and parts: the data's own masks, or by maps.py\n(auto: its own if there are, else maps/NAME)",
    )
    add(
        "--flat-weight",
        type=between(0, 1),
        default=0.1,
        metavar="W",
        help="loss weight of a flat patch; 1: as all",
    )
    add(
        "--weight-by",
        choices=["attn", "fg", "detail"],
        help="weigh the loss of a patch by the teacher's attention, foreground or contrast, too, under any mask",
    )
    add(
        "--no-norm-pix",
        action="store_true",
        help="predict raw pixels instead of each patch's contrast",
    )
    add(
        "--norm-floor",
        type=between(0, 1),
        default=FLOOR,
        metavar="S0",
        help="added to a patch's std in norm_pix, squared; plain MAE: --norm-floor .001 --flat-weight 1",
    )
    add = parser.add_argument_group(
        "contrast of two views of each image (common/agreement.py)"
    ).add_argument
    add(
        "--contrast",
        default=None,
        metavar="pooler|cls|none",
        help="what a second, contrastive loss compares: a pooler that reads the patch tokens and\n"
        "changes nothing in the encoder; the CLS tokens; or nothing, which is plain MAE.\n"
        "Parameters: pooler:weight=1,temperature=.15,dcl=1 (default: pooler; squares: none)",
    )
    add = parser.add_argument_group("training").add_argument
    add(
        "--epochs",
        type=at_least(1),
        help="passes over the data (default: as many as give a number of views, per device)",
    )
    add(
        "--batch-size",
        type=at_least(1),
        metavar="B",
        help="images for one optimizer step (default: per device)",
    )
    add(
        "--accumulate",
        type=at_least(1),
        default=1,
        metavar="N",
        help="split each batch into N that fit in memory",
    )
    add(
        "--blr",
        type=between(1e-9, 10),
        metavar="LR",
        help="base learning rate: lr = blr * views of a batch / 256 (default: per device)",
    )
    add(
        "--warmup",
        type=between(0, 1),
        default=0.1,
        metavar="SHARE",
        help="share of the run with a rising rate",
    )
    add(
        "--min-crop",
        type=between(0.01, 1),
        default=0.4,
        metavar="AREA",
        help="smallest share of an image in a crop",
    )
    add(
        "--jitter",
        type=between(0, 0.9),
        metavar="J",
        help="brightness, contrast and saturation of a view change by up to this share (default:\n"
        ".3 where two views are compared, else 0)",
    )
    add(
        "--swap-background",
        type=between(0, 1),
        metavar="SHARE",
        help="of the views, that get another image's background, by the data's own foreground or\n"
        "by --maps (default: .7 where two views are compared and the data have one, else 0)",
    )
    add("--seed", type=at_least(0), default=0, help="of weights, order, crops and masks")
    add("--eval-on", default="val", choices=["val", "dev", "test"], help="split of the evaluations")
    add(
        "--eval-every",
        type=at_least(1),
        metavar="EPOCHS",
        help="between evaluations (default: half, at most 10)",
    )
    add(
        "--every",
        type=at_least(0),
        default=0,
        metavar="EPOCHS",
        help="keep weights in snapshots/ (0: never)",
    )
    add(
        "--log",
        type=train.trackers,
        default=(),
        metavar="NAMES",
        help="tensorboard,wandb beside log.jsonl",
    )
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    add("--impl", default="auto", choices=["auto", "torch", "triton"], help="of the two kernels")
    add("--compile", action="store_true", help="torch.compile the network")
    return parser.parse_args()


# ---- before the loop: defaults, checks, names, network, batches ----------------------------------


def fill_defaults(args, device, dtype):
    """What was not given depends on the machine, and the sizes on the model.

    It does not depend on the mask: two runs that differ in --mask are an experiment. SimMIM is the
    one exception. Its encoder reads mask tokens, so there is no second loss on it.
    """
    kind = "cpu" if device.type == "cpu" else "gpu"
    args.dtype = "fp32" if dtype == torch.float32 else "bf16"
    simmim = args.mask.partition(":")[0] == "squares"
    args.contrast = args.contrast or ("none" if simmim else "pooler")
    args.contrast, args.agreement = parse_contrast(args.contrast)
    args.views = 1 if args.contrast == "none" else 2  # of each image
    defaults = DEFAULTS[kind] | {
        "batch_size": BATCH_VIEWS[kind] // args.views,
        "jitter": 0.0 if args.contrast == "none" else JITTER,
        "ratio": "0.6" if simmim else "0.75",
    }
    fill(args, defaults)
    fill(args, {k: SIZES[args.model][k] for k in ("image_size", "patch_size", "decoder_dim")})
    flags = flags_of_teacher(args, args.teacher)
    args.attention = args.attention or default_source(flags, args.teacher)


def fill(args, defaults):
    """Give every flag that was not given its default."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def set_length(args, images, device):
    """--epochs where it was not given: the number of whole passes nearest to VIEWS views."""
    views = VIEWS["cpu" if device.type == "cpu" else "gpu"]
    fill(args, {"epochs": max(1, round(views / (args.views * images)))})
    fill(args, {"eval_every": min(10, (args.epochs + 1) // 2)})
    if args.every > args.epochs:
        raise UserError(f"--every {args.every} keeps nothing of {args.epochs} epochs; leave it out")


def parse_masking(args):
    """--mask and --ratio -> the strategy, its parameters, the ratio at the start and at the end."""
    refuse_file(args.out or "runs")
    if args.batch_size % args.accumulate:
        raise UserError(
            f"--batch-size {args.batch_size} must be divisible by --accumulate {args.accumulate}"
        )
    name, params = parse_keys(args.mask, mask_keys(args.teacher), "--mask")
    try:
        ratios = parse_ratio(args.ratio)
        for ratio in ratios:
            masking.kept((args.image_size // args.patch_size) ** 2, ratio)
    except ValueError as problem:
        raise UserError(problem) from None
    refuse_unused(args, flags_used(args, name))
    return name, params, ratios


def mask_keys(teacher):
    """The keys of each mask, and their defaults: a trained teacher guides from the first step on."""
    keys = {name: dict(defaults) for name, defaults in masking.PARAMS.items()}
    for name, need in masking.NEEDS.items():
        if need == "attn" and teacher != "self":
            keys[name] |= {"start": 0.0, "ramp_for": 0.0}
    return keys


def parse_ratio(text):
    """ "0.75" -> (0.75, 0.75); ".5:.9", from the first epoch to the last, -> (0.5, 0.9)."""
    try:
        ratios = [float(word) for word in text.split(":")]
    except ValueError:
        ratios = []
    if len(ratios) not in (1, 2) or not all(0 < ratio < 1 for ratio in ratios):
        raise UserError(
            f"--ratio {text} must be between 0 and 1, such as 0.75, or a schedule such as 0.5:0.9"
        )
    return ratios[0], ratios[-1]


def flags_used(args, strategy):
    """The table for refuse_unused: flags that not every run has a use for."""
    need, own = masking.NEEDS.get(strategy), f", not for --mask {strategy}"
    guided = [name for name, what in masking.NEEDS.items() if what == "attn"]
    return (
        (
            "teacher attention",
            "attn" in (need, args.weight_by),
            f"is for masks guided by attention ({', '.join(guided)}), and for --weight-by attn{own}",
        ),
        (
            "weight-by",
            args.weight_by != need or "shuffle=" not in args.mask,
            f"asks for its own map{own}:shuffle=1",
        ),
        (
            "attention",
            args.teacher != "maps",
            "chooses among an encoder's, and --teacher maps has made its choice",
        ),
        (
            "maps",
            need in ("fg", "parts")
            or args.teacher == "maps"
            or args.weight_by == "fg"
            or args.swap_background,
            "is for masks that know foreground or parts (fg_heavy, bg_heavy, parts), for --weight-by fg, for "
            f"--swap-background and for --teacher maps{own}",
        ),
        (
            "contrast",
            strategy != "squares" or args.contrast == "none",
            f"compares what MAE's encoder makes of visible patches alone{own}",
        ),
        (
            "norm-floor",
            not args.no_norm_pix,
            "is a part of norm_pix, which --no-norm-pix turns off",
        ),
        (
            "decoder-dim decoder-depth",
            strategy != "squares",
            f"is for MAE's decoder, SimMIM has one linear layer{own}",
        ),
    )


def use_impl(name, device):
    """Set what "auto" means to the kernels -> (implementation, the reason)."""
    kernels.default = name
    try:
        return kernels.choose_impl("auto", device)
    except ValueError as problem:
        raise UserError(problem) from None


def run_name(args):
    """The data, the model, the mask, and every flag that is not at its default."""
    words = [
        Path(args.data).name,
        args.model,
        args.mask,
        args.ratio,
        "" if args.flat_weight == 0.1 else f"flat{args.flat_weight:g}",
        "raw" if args.no_norm_pix else "",
        "" if args.norm_floor == FLOOR else f"floor{args.norm_floor:g}",
        "" if args.teacher == "self" else f"by-{Path(args.teacher).name}",
        "" if args.init is None else f"from-{Path(args.init).name}",
        f"contrast-{args.contrast}" if "contrast" in args.given else "",
        f"weighted-by-{args.weight_by}" if args.weight_by else "",
        args.attention if "attention" in args.given else "",
        "" if args.maps == "auto" else Path(args.maps).name,
        f"s{args.seed}",
    ]
    return "-".join(filter(None, words)).replace(":", "-").replace(",", "-")


def config_of(args):
    """The flags that decide the weights: a run can only be resumed under the same."""
    leave_out = (
        "out",
        "resume",
        "log",
        "device",
        "compile",
        "impl",
        "eval_every",
        "eval_on",
        "every",
        "given",
    )
    return {k: v for k, v in vars(args).items() if k not in leave_out}


def open_data(args):
    """-> the training split and that of the evaluations, packed first where they are images.

    The default of --swap-background depends on what they hold.
    """
    with distributed.zero_first():
        args.data = str(data.open_or_pack(args.data, args.image_size))
    train_set = data.open_split(args.data, "train")
    if args.swap_background is None:
        args.swap_background = SWAP if args.contrast != "none" and "fg" in train_set else 0.0
    return train_set, data.open_split(args.data, args.eval_on)


def build_model(args, strategy):
    """The network, its weights drawn from --seed: MAE, or SimMIM for its own mask."""
    torch.manual_seed(args.seed)
    size = {k: SIZES[args.model][k] for k in ("dim", "depth", "heads")}
    build = SimMIM if strategy == "squares" else MAE
    model = build(
        args.image_size,
        args.patch_size,
        **size,
        decoder_dim=args.decoder_dim,
        decoder_depth=args.decoder_depth,
        decoder_heads=decoder_heads_of(args.init),
    )
    if args.contrast == "pooler":
        model.encoder.pooler = Pooler(size["dim"], size["heads"])
    return model


def decoder_heads_of(checkpoint):
    """The heads of the decoder that a run starts from; None where there is none."""
    if not checkpoint:
        return None
    _, facts = read_checkpoint(checkpoint)
    return facts["decoder_heads"] if facts["decoder_depth"] else None


def make_guide(args, strategy, params, encoder, train_set, device, autocast, views):
    """What the flags say of a Guide."""
    return Guide(
        strategy,
        params,
        encoder,
        train_set,
        args.data,
        device,
        autocast,
        teacher=args.teacher,
        source=args.attention,
        maps=args.maps,
        epochs=args.epochs,
        views=views,
        weigh=args.weight_by,
        swap=args.swap_background,
    )


def networks_of(args, model, guide, train_set):
    """All that a resumed run needs the weights of: the model, what guides the mask, the projector
    of the agreement.
    """
    networks = {"model": model, **guide.networks}
    if args.contrast != "none":
        settings = args.agreement
        networks["agreement"] = Agreement(
            model.config["dim"], train_set, settings["temperature"], settings["dcl"] > 0
        )
    return torch.nn.ModuleDict(networks)


def fit_batch(args, images, rank, world, V):
    """-> B: --batch-size, or fewer where the set has fewer images; the b of them that this process
    works on; which of V*B views theirs are.

    Every process and every micro-batch gets as many.
    """
    B, splits = (
        min(args.batch_size, images // args.accumulate * args.accumulate),
        world * args.accumulate,
    )
    if B == 0:
        raise UserError(
            f"{args.data} has {images} training images, --accumulate needs {args.accumulate}"
        )
    if args.contrast != "none" and args.accumulate == B:
        raise UserError(
            f"--contrast compares each image with others, and --batch-size {B} --accumulate "
            f"{args.accumulate} leaves it alone; give a larger batch, 128 if it fits"
        )
    if B % splits:
        fits = next(
            (n for n in (-(-B // splits) * splits, B // splits * splits) if 0 < n <= images), None
        )
        fix = (
            f"--batch-size {fits} is"
            if fits
            else f"{args.data} has {images} images: use fewer processes"
        )
        raise UserError(
            f"--batch-size must be divisible by processes x --accumulate, {world} x {args.accumulate}: "
            f"{B} is not; {fix}"
        )
    b = B // world
    return B, b, slice(V * rank * b, V * (rank + 1) * b)


def check_memory(args, device, strategy, ratio, b):
    """Refuse what memory can't hold: a step of b images on this device, or an evaluation of whole
    images.
    """
    size, item, fused = SIZES[args.model], 4 if args.dtype == "fp32" else 2, device.type != "cpu"

    def need(image_size):
        N = (image_size // args.patch_size) ** 2
        decoder = (
            []
            if strategy == "squares"
            else [(N, args.decoder_dim, args.decoder_depth, args.decoder_dim // 32)]
        )

        def memory(n, images, learns):
            return train.step_memory(
                [(n, size["dim"], size["depth"], size["heads"]), *decoder],
                images,
                item,
                fused,
                learns,
            )

        seen = N if strategy == "squares" else int(N * (1 - ratio))  # by the encoder, in a step
        return max(memory(seen, b // args.accumulate, True), memory(N, data.CHUNK, False))

    train.check_memory(device, args.image_size, args.patch_size, need)


def micro_batches(b, n):
    """-> n slices of b rows."""
    return [slice(i, i + b // n) for i in range(0, b, b // n)]


def machine_message(args, device, world, dtype_reason, impl, impl_reason):
    """What is printed before the data are opened."""
    return (
        f"machine  {train.machine(device)}{f', {world} processes' if world > 1 else ''}\n"
        f"         {args.dtype}: {dtype_reason}; kernels in {impl}: {impl_reason}"
    )


def recipe(args, images, batch, peak_lr):
    """What every mask is trained by, in one line."""
    views = args.epochs * images * args.views
    contrast = f"contrast {args.contrast}"
    if args.contrast != "none":
        contrast += f" (weight {args.agreement['weight']:g})"
    return (
        f"{views:,} views: {args.epochs} epochs, views of an image {args.views}, "
        f"images of a step {batch}; {contrast}, jitter {args.jitter:g}, "
        f"background swapped in {args.swap_background:.0%}, learning rate {peak_lr:.2g}"
    )


def start_message(
    args, out, train_set, held_set, model, ratio, batch, peak_lr, step, init_message, guided_by
):
    """What is printed before the first step."""
    blind = "attention of" in (guided_by or "") and not is_trained(
        args.attention, flags_of_teacher(args, args.teacher), args.teacher
    )
    lines = (("init", init_message), ("guide", guided_by), ("warning", blind and UNTRAINED))
    more = [f"{word:9}{line}" for word, line in lines if line]
    N, p = model.encoder.side**2, args.patch_size
    count = sum(w.numel() for name, w in model.named_parameters() if "stats_head" not in name)
    images, classes = len(train_set["images"]), len(train_set["header"]["classes"])
    return "\n".join(
        (
            f"data     {args.data}: {images} train, {len(held_set['images'])} {args.eval_on} images, {classes} classes",
            f"model    {args.model}: {count / 1e6:.1f} M parameters, {args.image_size} px in {N} patches of {p} px, "
            f"{masking.kept(N, ratio)} of them visible",
            *more,
            f"recipe   {recipe(args, images // batch * batch, batch, peak_lr)}",
            f"run      {out}: {args.mask}, {args.epochs * (images // batch)} steps"
            + (f"; going on from step {step}" if step else ""),
        )
    )


def load_run(state, path, learning, optimizer, guide):
    """Put the state of a run that is resumed in its place -> its step, and the seconds that it took
    so far.
    """
    with train.taking_up(path):
        for name, network in learning.items():
            load_exactly(network, state[name], path)
        guide.load_maps(state["maps"], path)
        train.load_optimizer(optimizer, state["optimizer"])
        return int(state["step"]), float(state["seconds"])


def save_run(out, learning, optimizer, guide, config, step, seconds):
    """state.pt: everything that a resumed run needs. Maps that it does not name are removed after
    it is written.
    """
    state = {name: network.state_dict() for name, network in learning.items()}
    state |= {"optimizer": optimizer.state_dict(), "maps": guide.file}
    train.save_state(state | {"config": config, "step": step, "seconds": seconds}, out / "state.pt")
    for old in set(out.glob("attn-*.safetensors")) - {out / str(guide.file)}:
        old.unlink()


# ---- the run -------------------------------------------------------------------------------------


def main():
    args = parse_args()
    device = train.pick_device(args.device)
    dtype, dtype_reason = train.pick_dtype(args.dtype, device)
    fill_defaults(args, device, dtype)
    strategy, params, ratios = parse_masking(args)
    rank, world, device = distributed.join(device)
    autocast = train.autocast_of(device, dtype)
    print(machine_message(args, device, world, dtype_reason, *use_impl(args.impl, device)))

    # network and data
    train_set, held_set = open_data(args)
    set_length(args, len(train_set["images"]), device)
    out = Path(args.out or f"runs/{run_name(args)}")
    S, p, N = args.image_size, args.patch_size, (args.image_size // args.patch_size) ** 2
    norm = {"norm_pix": not args.no_norm_pix, "floor": args.norm_floor}  # of the targets
    loss_fn = functools.partial(
        reconstruction_loss, error_of=ERRORS.get(strategy), return_error=True, **norm
    )
    V = args.views  # of each image: neighbours in a batch of V*B
    B, b, rank_slice = fit_batch(args, len(train_set["images"]), rank, world, V)
    check_memory(args, device, strategy, min(ratios), V * b)
    model = build_model(args, strategy).to(device)
    per_epoch, peak_lr = len(train_set["images"]) // B, args.blr * V * B / 256
    total = per_epoch * args.epochs

    # what guides the mask, optimizer, and the state of a run that is resumed
    init_message = (
        init_from(model, args.init) if args.init and not (out / "state.pt").exists() else ""
    )
    guide = make_guide(args, strategy, params, model.encoder, train_set, device, autocast, V)
    config = config_of(args) | {"images": len(train_set["images"]), "guide": guide.about}
    state = train.open_run(out, config, args.resume, WRITTEN)
    net = torch.compile(model) if args.compile else model
    learning = networks_of(args, model, guide, train_set).to(
        device
    )  # a teacher among them has no gradient
    optimizer = train.make_optimizer(learning, peak_lr, WEIGHT_DECAY)
    summed = [
        w for name, w in learning.named_parameters() if "agreement" not in name
    ]  # over processes
    clipped = [
        w
        for name, w in model.named_parameters()
        if "stats_head" not in name and "pooler" not in name
    ]
    step, seconds = (
        load_run(state, out / "state.pt", learning, optimizer, guide) if state else (0, 0.0)
    )
    log = train.Log(out / "log.jsonl", step if state else -1, args.log, config, write=rank == 0)
    print(
        start_message(
            args,
            out,
            train_set,
            held_set,
            model,
            ratios[0],
            B,
            peak_lr,
            step,
            init_message,
            guide.about,
        )
    )

    stop_signal, meter, pacer = (
        train.catch_signals(),
        train.Meter(B, device, seconds),
        train.Pacer(),
    )
    judge = functools.partial(
        evaluate,
        model,
        guide.teacher or model.encoder,
        train_set,
        held_set,
        args.eval_on,
        norm,
        autocast,
        args.attention,
    )
    if step == 0 and rank == 0:
        log(step=0, **judge(0.0), seconds=meter.seconds())
    images, view = data.resident(train_set, device), None
    bar = progress(total=total, initial=step, unit="step", disable=rank > 0)

    for epoch in range(step // per_epoch, args.epochs):
        if step == epoch * per_epoch:
            guide.refresh_maps(epoch, step, train_set["images"], out)
        order = data.epoch_order(len(images), args.seed, epoch)
        for rows, batch in meter.timed(data.batches(images, order, B, device, step % per_epoch, V)):
            # view and mask; all random numbers are drawn here, on the CPU, for the whole batch
            batch = batch[rank_slice]
            t = step / total  # progress of the run
            generator = train.seeded(args.seed, epoch, step)
            boxes, flip = data.draw_boxes(V * B, generator, args.min_crop)
            drawn = (
                boxes,
                flip,
                masking.gumbel_noise(V * B, N, generator),
                torch.rand(V * B, 4, generator=generator),
            )
            boxes, flip, noise, draws = (data.send(x[rank_slice], device) for x in drawn)
            view = data.view_images(batch, boxes, flip, S)  # u8 (V*b, S, S, 3)
            view = guide.swap_backgrounds(view, rows, boxes, flip, draws[:, 3], rank_slice)
            view = data.jitter_colour(view, draws[:, :3], args.jitter)
            K = masking.kept(N, ratios[0] + (ratios[1] - ratios[0]) * t)
            patches = guide.patch_scores(rows, boxes, flip, view, rank_slice)
            priority = masking.STRATEGIES[strategy](patches, noise, t, N - K, **params)  # (b, N)
            ids_keep, ids_mask = masking.sample(priority, K)  # (b, K), (b, M)

            # forward, loss, backward, in micro-batches that fit in memory; the weights' sum is the
            # whole batch's
            weight = detail_weight(
                patch_detail(view, ids_mask, p), args.flat_weight
            ) * guide.weights(patches, ids_mask)
            weight_sum, loss = distributed.all_reduce(weight.sum()), 0.0
            for now in micro_batches(V * b, args.accumulate):
                visible = masked_patch_gather(view[now], ids_keep[now], p, dtype)  # (V*b/n, K, P)
                with autocast():
                    pred, stats, tokens = net(
                        visible, ids_keep[now], ids_mask[now]
                    )  # (V*b/n, M, P), ..., 2), 1+K, D)
                micro_loss, error = loss_fn(
                    pred, view[now], ids_mask[now], p, weight[now], weight_sum=weight_sum
                )
                aux_loss = stats_loss(
                    stats, view[now], ids_keep[now], ids_mask[now], p, args.norm_floor
                )
                aux_loss = aux_loss + guide.loss(
                    now, ids_mask[now], error
                )  # so far no gradient for the network
                if args.contrast != "none":
                    agreement = learning["agreement"](
                        model.encoder.summary(tokens), rows.view(world, -1)[:, now]
                    )
                    # agreement is the whole batch's, in every process
                    aux_loss = aux_loss + args.agreement["weight"] * world * agreement
                (micro_loss + aux_loss / (args.accumulate * world)).backward()
                loss = loss + micro_loss.detach()

            # update
            guide.backward()
            distributed.all_reduce_gradients(summed)
            grad_norm = torch.nn.utils.clip_grad_norm_(clipped, CLIP)
            lr = train.set_lr(optimizer, train.lr_at(step, total, args.warmup * total, peak_lr))
            optimizer.step()
            optimizer.zero_grad()
            guide.update_ema(model.encoder, step, total)
            step += 1

            # log, evaluate, save
            bar.update()
            meter.add(loss, grad_norm)
            stop = distributed.largest(
                stop_signal[0] if stop_signal else 0
            )  # all stop after the same step
            if step % LOG_EVERY == 0 or step % per_epoch == 0 or stop:
                row = meter.row(
                    step,
                    f"{out}/state.pt is the last good state; try --blr under {args.blr:g} or fp32",
                )
                row |= guide.statistics(patches, ids_mask, step, total)
                row |= learning["agreement"].statistics() if V == 2 else {}
                warn_of_collapse(step, row)
                log(step=step, epoch=round(step / per_epoch, 4), lr=lr, **row)
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                if rank == 0 and (step % (per_epoch * args.eval_every) == 0 or step == total):
                    log(step=step, **judge(step / per_epoch), seconds=meter.seconds())
                if rank == 0 and args.every and step % (per_epoch * args.every) == 0:
                    save_model(
                        model,
                        out / SNAPSHOT.format(epoch + 1),
                        {"step": step, "run": config, **norm},
                    )
                if stop or step == total or pacer.due():
                    if rank == 0:
                        pacer.time(
                            save_run, out, learning, optimizer, guide, config, step, meter.seconds()
                        )
                    meter.restart()
            distributed.stop_here(stop, step, args.resume)
    bar.close()
    distributed.leave()

    last = (
        None if view is None else (view[: 8 * V : V], ids_mask[: 8 * V : V], guide.shown(patches))
    )  # None: finished
    save_beside(model, out)
    save_model(model, out / "model.safetensors", {"step": step, "run": config, **norm})
    draw_run(
        log,
        model,
        held_set,
        norm,
        autocast,
        last,
        args.eval_on,
        f"{args.mask}, ratio {args.ratio}, {args.model}, {Path(args.data).name}",
    )
    print(
        f"wrote    {out}/model.safetensors, recon.png, curves.png, masks.png after {meter.seconds():.0f} s\n"
        f"next: python probe.py {shlex.quote(str(out))}"
    )


if __name__ == "__main__":
    cli(main)
