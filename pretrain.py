"""Stage 2: masked pre-training. A ViT learns anime images by predicting hidden patches.

    python pretrain.py --mask attn_high --ratio 0.75
    python pretrain.py --resume runs/NAME
    torchrun --nproc-per-node 8 pretrain.py --mask attn_high --ratio 0.75       (a GPU each)

Reads:  datasets/NAME (drawn or packed first if it is not there), maps/NAME (apps/maps.py makes them)
Writes: runs/NAME/ state.pt and attn-*.safetensors (what a resumed run needs), model.safetensors,
        pooler.safetensors (whose attention can guide masks), stats_head.safetensors (which restores
        the colours of predicted patches), log.jsonl, pictures

Random numbers are drawn on the CPU from (seed, epoch, step, process). So two masks with one seed see
the same images with the same crops. On a CPU, a run resumed by the same code ends with the same bits.

    b images of a step, of one process (helpers write B)   m of them have a second view (contrast.py)
    S side of a stored image   s side of a view   p side of a patch, which has p*p*3 numbers
    N patches of a view   K visible   M hidden   D width of the encoder
"""

import argparse
import contextlib
import datetime
import functools
import os
import re
import signal
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import data
import kernels
import mask as masking
from common import guidance, train
from common.checkpoints import (
    BESIDE,
    check_readable,
    check_registered,
    flags_of,
    init_from,
    load_teacher,
    save_model,
)
from common.command import (
    Parser,
    at_least,
    between,
    cli,
    launched,
    parse_keys,
    refuse_useless,
    run_name,
    set_defaults,
)
from common.contrast import SETTINGS, Contrast
from common.evaluate import attention_by_part, draw_masks, draw_run, evaluate
from common.graphs import Replayed
from common.io import UserError, quoted
from kernels.gather import FLOOR, masked_patch_gather
from kernels.loss import (
    absolute_error,
    detail_weight,
    patch_detail,
    predicted_stats,
    reconstruction_error,
    stats_loss,
    weighted_mean,
)
from model import MAE, SIZES, SimMIM, pooler_of

WEIGHT_DECAY = 0.05  # of AdamW, as in MAE
CLIP = 1.0  # largest norm of the gradient: a run of minutes has no time to recover from a jump
# Beginnings of names: weights whose losses are not the MAE's, so that their gradients are not clipped with
# its own. Add yours here, and not to BESIDE, which says what has files of its own.
UNCLIPPED = (*BESIDE,)
WARMUP = 0.1  # share of the run in which the learning rate rises
RATIO_STREAM = 1 << 20  # seeds the draws of a ratio; smaller numbers are those of processes
SECOND_STREAM = 1  # seeds the second views, so that they change no other random number
OF_SCORES = ("teacher", "attention", "maps")  # flags that only some masks read
WAIT = datetime.timedelta(hours=6)  # the other processes wait while the first packs or evaluates
# What fits the device; views: of a whole run, batch: views of a step. On a CPU, many small steps learn
# more (results/TRIED.md).
GPU = {"model": "small", "blr": 6e-4, "views": 4_000_000, "batch": 512}
CPU = {"model": "nano", "blr": 8e-3, "views": 64_000, "batch": 32}
DEFAULTS = {"cpu": CPU, "cuda": GPU, "mps": GPU}
RECIPES = {
    "mae": {"mask": "random", "ratio": "0.75", "contrast": "pooler"},
    "simmim": {"mask": "squares", "ratio": "0.6", "contrast": "none"},
}


def parse_flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="datasets/toon", metavar="DIR", help="packed set, or images to pack")
    add("--out", metavar="DIR", help="folder of the run (default: runs/ and the flags given)")
    add("--model", metavar="NAME[:key=value,...]", help=f"{', '.join(SIZES)}; simmim=1: SimMIM")
    add("--init", metavar="PATH", help="start from a run, or from a checkpoint of MAE or DINO")
    add("--mask", metavar="NAME[:key=value,...]", help=", ".join(masking.STRATEGIES))
    add("--ratio", metavar="R", help="share that is not seen; 0.5:0.9 rises, 0.5-0.9 is drawn")
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
        refuse_useless(flags.given & unread, f"with --mask {flags.mask or 'random'}")
    train.take_saved_flags(flags)
    set_defaults(flags, out=f"runs/{run_name(flags, Path(flags.data).name)}")
    return flags


def flags_of_mask(flags):
    """Those of OF_SCORES that the strategy of --mask reads: it follows one score, or none."""
    score = masking.NEEDS.get((flags.mask or "random").partition(":")[0])
    if score == "attn":
        return {"teacher", "maps" if flags.teacher == "maps" else "attention"}
    return {"maps"} if score in guidance.IN_FILES else set()


# ---- several processes, each with a GPU and with other views --------------------------------------


def start_processes(device):
    """The number of this process, how many torchrun started, and this one's device."""
    if not launched() or os.environ["WORLD_SIZE"] == "1":  # one alone, whoever started it
        return 0, 1, device
    if device.type == "cuda":
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there:
            raise UserError(
                f"{number + 1} processes and {there} GPUs; give --nproc-per-node {there}"
            )
        device = train.pick_device(f"cuda:{number}")
    # NCCL averages gradients between GPUs, but a tensor on the CPU, such as the number of a signal, needs
    # Gloo. So both are named: by itself, torch would choose one of them.
    gpus = device.type == "cuda" and distributed.is_nccl_available()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=WAIT)
    if distributed.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return distributed.get_rank(), distributed.get_world_size(), device


def check_processes(flags, world):
    """A run goes on with as many processes as before: the crops and masks of each are drawn by its number."""
    before = getattr(flags, "processes", world)
    again = f"torchrun --nproc-per-node {before} pretrain.py --resume {quoted(flags.out)}"
    train.same_as_begun(flags, "processes", world, f"the number of processes ({world} now)", again)


def of_first(value):
    """The value of the first process: each may have measured another one, such as the faster dtype."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def share_gradients(network):
    """The network for the loop; with several processes, their gradients are averaged."""
    if network is not None and distributed.is_initialized():
        return DistributedDataParallel(network, broadcast_buffers=False)  # buffers are constants
    return network


def stop_together(run):
    """A signal that one process got stops all of them after the same step."""
    # A signal that comes after this exchange waits for the next step. A process that stopped by itself
    # would leave the others waiting for its gradients.
    if distributed.is_initialized():
        number = torch.tensor(run.caught[0] if run.caught else 0)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        run.stop = [signal.Signals(number.item())] if number > 0 else []


# ---- before the loop -----------------------------------------------------------------------------


def parse_model(flags, device):
    """--model and --contrast: the network, its arguments, and the settings of the contrastive loss.

    Sets the defaults of model, blr, mask, ratio and contrast.
    """
    defaults = DEFAULTS[device.type]
    set_defaults(flags, model=defaults["model"], blr=defaults["blr"])
    sizes = {name: size | {"simmim": 0} for name, size in SIZES.items()}
    _, size = parse_keys(flags.model, sizes, "--model")
    simmim = size.pop("simmim") != 0
    set_defaults(flags, **RECIPES["simmim" if simmim else "mae"])
    contrast, settings = parse_keys(flags.contrast, SETTINGS, "--contrast")
    if simmim and "decoder_" in flags.model:
        raise UserError(f"--model {flags.model}: SimMIM has a decoder of one layer; drop decoder_*")
    if simmim and contrast != "none":
        raise UserError(f"--contrast {contrast}: SimMIM has no contrastive loss; choose none")
    return SimMIM if simmim else MAE, size, settings


def open_data(flags, image_size, rank):
    """The training split, and that of the evaluations. Process 0 packs images first.

    A resumed run needs the pictures with which it began: its teacher's maps are of these.
    """
    if rank == 0:
        flags.data = str(data.open_or_pack(flags.data, image_size))
    if distributed.is_initialized():
        distributed.barrier()
    if rank > 0:
        flags.data = str(data.open_or_pack(flags.data, image_size))
    train_set = data.open_split(flags.data, "train")
    train.same_as_begun(flags, "digest", data.digest(flags.data), flags.data)
    return train_set, data.open_split(flags.data, flags.split)


def set_length(flags, n_images, N, device, world):
    """Images of a step for each process, and steps of an epoch; n_images: of the training split.

    Sets the defaults of epochs, batch_size and eval_every. A run is as long for few images as for many.
    """
    defaults = DEFAULTS[device.type]
    batch = defaults["batch"]
    if device.type == "mps":
        while batch * (N + 1) > train.METAL_ROWS:
            batch //= 2
    set_defaults(flags, batch_size=batch)
    b = min(flags.batch_size, n_images) // world
    # The contrastive loss compares images, and with shuffle=1 one takes the map of another.
    if b < (1 if flags.contrast == "none" and "shuffle=1" not in flags.mask else 2):
        raise UserError(f"--batch-size {flags.batch_size}: {b} a process are too few; raise it")
    flags.batch_size = b * world
    train.warn_of_metal(flags.batch_size * (N + 1), device)
    steps = n_images // flags.batch_size  # the images that fill no batch wait for another epoch
    set_defaults(flags, epochs=max(1, round(defaults["views"] / (steps * flags.batch_size))))
    # An evaluation of the demo set takes about as long as an epoch, so there are five epochs or more
    # between two. Only a shorter run has one in its middle.
    every = min(max(5, flags.epochs // 16), (flags.epochs + 1) // 2)
    set_defaults(flags, eval_every=every)
    return b, steps


def build_network(kind, size, flags, rank):
    """A network of this kind, MAE or SimMIM, its weights drawn from --seed or read from --init."""
    torch.manual_seed(flags.seed)
    try:
        model = kind(**size)
    except ValueError as problem:  # sizes that do not fit each other
        raise UserError(f"--model {flags.model}: {problem}") from None
    if rank == 0:
        check_readable(model)  # fails now, and not after the last step, if a file could not hold it
    if flags.init and not flags.resume:
        print(f"init     {init_from(model, flags.init)}")
    return model


def build_contrast(encoder, flags, settings, train_set, figures):
    """The contrastive loss, and for pooler the network that it trains; None without such a loss.

    Its random numbers are drawn aside: with and without it, all other weights begin alike.
    """
    if not settings:
        return None
    name = flags.contrast.partition(":")[0]
    with torch.random.fork_rng(devices=[]):
        if name == "pooler":
            encoder.pooler = pooler_of(encoder)
        elif name != "cls":
            raise UserError(f"--contrast {name}: build_contrast has no branch for it; write one")
        contrast = Contrast(encoder, settings, train_set, figures, flags.min_crop)
    check_registered(contrast)  # and with it the pooler
    return contrast


def changes(ratio):
    return ":" in ratio or "-" in ratio


def ends_of(ratio):
    """ "0.75" -> (0.75, 0.75); "0.5:0.9" and "0.5-0.9" -> (0.5, 0.9)."""
    words = re.split("[:-]", ratio, maxsplit=1)
    return float(words[0]), float(words[-1])


def compiles(flags, device):
    """Whether the loop compiles its functions: --compile, or by default if they all have one shape."""
    can = device.type == "cuda" and kernels.why_not_triton(device) is None  # torch.compile needs it
    default = can and not changes(flags.ratio)  # one ratio, one shape
    return default if flags.compile is None else flags.compile


def why_no_graph(flags, device, world, source, optimizer):
    """Why the update of a compiled run can't be replayed as one CUDA graph, or None if it can."""
    if device.type != "cuda":
        return f"on this {device.type}"
    if world > 1:
        return "while processes share gradients"
    if source.predictor is not None:
        return f"with --mask {flags.mask}, which learns"
    if changes(flags.ratio):
        return f"with --ratio {flags.ratio}, which changes"
    # A graph repeats what the GPU did, and a number that Python counted would stay what it was.
    if not type(optimizer).__module__.startswith("torch.optim"):
        return f"with {type(optimizer).__name__}, which may count its steps in Python"
    return None


def parse_mask(flags, N):
    """--mask and --ratio, for N patches: the name of the strategy, and its parameters."""
    keys = masking.PARAMS
    # A trained teacher is worth following at once, and not after a tenth of the run.
    if flags.teacher != "self":
        late = {"start", "ramp_for"}
        keys = {name: own | dict.fromkeys(own.keys() & late, 0.0) for name, own in keys.items()}
    name, params = parse_keys(flags.mask, keys, "--mask")
    try:
        for ratio in ends_of(flags.ratio):
            masking.kept(N, ratio, params["throw"])
    except (ValueError, OverflowError) as problem:
        raise UserError(f"--ratio {flags.ratio}: {problem}") from None
    return name, params


def make_mask(name, params, flags, encoder, train_set, autocast):
    """The strategy, the source of the score that it follows, and the share that is thrown."""
    throw = params.pop("throw")
    shuffle = params.pop("shuffle", 0) > 0
    start = params.get("start", masking.START)
    score = masking.NEEDS.get(name)
    source = make_source(score, flags, encoder, train_set, autocast, start, shuffle)
    return functools.partial(masking.STRATEGIES[name], **params), source, throw


def make_source(score, flags, encoder, train_set, autocast, start, shuffle):
    """Where the score that a strategy follows comes from (common/guidance.py)."""
    if score is None:
        return guidance.Source()
    if score == "view":
        return guidance.ViewScore(shuffle)
    if score == "difficulty":
        return guidance.PredictedScore(encoder, autocast, shuffle)
    if score == "attn" and flags.teacher != "maps":
        teacher = make_teacher(encoder, flags, start)
        print(f"score    attention ({teacher.attention_kind}) of {flags.teacher}")
        return guidance.TeacherScore(encoder, teacher, flags.out, shuffle)
    if score not in guidance.IN_FILES:
        raise UserError(f"--mask {flags.mask}: nothing computes {score!r}; add it to make_source")
    maps, parts, note = guidance.open_maps(score, flags.maps, flags.data, train_set)
    print(f"score    {note}")
    return guidance.MapScore(score, encoder, maps, parts, shuffle)


def make_teacher(encoder, flags, start):
    """The average of the run's own encoder, or the encoder of --teacher."""
    name = flags.teacher
    default = guidance.default_attention(vars(flags) if name == "self" else flags_of(name), name)
    kind = flags.attention or default
    # A loss on the CLS token trains its attention in all blocks, one on the pooler that of the pooler.
    trained = {"pooler": ("pooler",), "outlier": ()}.get(default, ("cls", "rollout"))
    if kind not in (*trained, "outlier"):
        fix = f"--contrast {'pooler' if kind == 'pooler' else 'cls'} does"
        print(f"warning  nothing trains the attention ({kind}) of this teacher; {fix}")
    if name == "self":
        return guidance.average_of(encoder, kind, flags.epochs, start)
    teacher = load_teacher(name).to(encoder.cls_token.device)
    return guidance.Teacher(teacher, kind, epochs={0})


# ---- in the loop ---------------------------------------------------------------------------------


def draw(generator, n, N, min_crop, device):
    """Random numbers of n views: crops (n, 4), flips (n,), and noise for the mask (n, N)."""
    boxes, flip = data.draw_boxes(n, generator, min_crop)
    noise = masking.gumbel_noise(n, N, generator)
    return (data.send(x, device) for x in (boxes, flip, noise))


def ratio_at(text, t, stream):
    """The ratio of a step: "0.75", "0.5:0.9" (it rises with t) or "0.5-0.9" (arXiv:2509.21650).

    The last is drawn for each step, uniformly, and all processes draw the same number.
    """
    first, last = ends_of(text)
    if "-" in text:
        t = torch.rand((), generator=train.seeded(*stream[:3], RATIO_STREAM)).item()
    return first + (last - first) * t


def refresh_maps(source, epoch, run, images, autocast):
    """Before some epochs the teacher makes maps of all images; process 0 writes them for all."""
    begins = run.step == epoch * run.per_epoch
    if source.teacher is None or epoch not in source.teacher.epochs or not begins:
        return
    name = f"attn-{run.step:08d}.safetensors"
    if run.writes:
        source.teacher.write_maps(images, run.out / name, autocast)
    if distributed.is_initialized():
        distributed.barrier()
    source.open_maps(name)


def check_priority(priority, mask):
    """A UserError where a priority (b, N) has no order; it waits for the GPU, as a row of the log does."""
    # One infinite score makes a whole picture NaN. A sort puts all of it last, so the same patches would
    # be hidden in every step, and the loss would look healthy.
    if not priority.isfinite().all():
        raise UserError(
            f"--mask {mask}: a priority is not finite; clamp its score, as before a log"
        )


def log_evaluation(run, model, teacher, splits, target_options, autocast):
    """A row of the log: how good the encoder is, and on what the attention falls, where that is known.

    It is the attention of the teacher or, without one, of the encoder.
    """
    model.eval()  # switches off dropout, if you add some
    row = evaluate(model, splits, target_options, autocast, run.step / run.per_epoch)
    if splits[1]["header"].get("parts"):
        encoder = teacher.encoder if teacher else model.encoder
        default = guidance.default_attention(run.config, "self")
        kind = teacher.attention_kind if teacher else default
        row["attention_on"] = attention_by_part(encoder, splits[1], kind, autocast)
    run.log(**row)
    model.train()


def finish(run, model, source, held_set, target_options, autocast):
    """Write what the next stages read, and the pictures."""
    if not run.writes:
        return
    notes = {"step": run.step, "commit": run.commit, "run": run.config, **target_options}
    save_model(model, run.out / "model.safetensors", notes)
    draw_run(run.out, model.eval(), held_set, target_options, autocast)
    for old in sorted(run.out.glob("attn-*.safetensors")):
        if old.name != source.file:
            with contextlib.suppress(OSError):  # Windows removes no file that is open
                old.unlink()
    print(f"wrote    {run.out}: model.safetensors and pictures, after {run.seconds():.0f} s")
    print(f"next: python probe.py {quoted(run.out)}")


def main():
    flags = parse_flags()
    rank, world, device = start_processes(train.pick_device(flags.device))
    check_processes(flags, world)
    flags.dtype, reason = train.pick_dtype(flags.dtype, device)  # a resumed run keeps it
    flags.dtype = of_first(flags.dtype)
    dtype = train.DTYPES[flags.dtype]
    autocast = train.autocast_of(device, flags.dtype)
    kind, size, contrast_settings = parse_model(flags, device)  # {} for --contrast none
    s, p = size["image_size"], size["patch_size"]

    model = build_network(kind, size, flags, rank).to(device)
    N = model.encoder.side**2
    # Network and mask come first: a typo should not wait until pictures are packed.
    mask = parse_mask(flags, N)

    train_set, held_set = open_data(flags, s, rank)
    images = data.resident(train_set["images"], device)  # on the GPU, if it has room for them
    # Foreground masks u8 (n, S, S), or None: second views get the background of another image.
    figures = data.resident(train_set.get("fg") if contrast_settings else None, device)
    b, per_epoch = set_length(flags, len(images), N, device, world)  # and the flags of the length
    total = flags.epochs * per_epoch
    # Twice the batch means half the steps, so the learning rate grows with it, as in MAE's code (after
    # Goyal et al. 2017, for SGD). With AdamW this is too much: in short runs, four times the batch
    # wanted less than four times the rate (results/TRIED.md).
    peak_lr = flags.blr * flags.batch_size / 256

    # network: the model as the loop calls it. With several processes, it also averages their gradients
    # (DistributedDataParallel), and for that it waits in each step for the gradient of every weight that
    # it knows. So build_contrast adds model.encoder.pooler only afterwards: the pooler has no gradient
    # in steps without the contrastive loss.
    compiling = compiles(flags, device)
    network = model
    if compiling:
        # torch compiles a function only a few times in a process, and a notebook may start many runs.
        torch.compiler.reset()
        if world > 1:  # alone, all losses are compiled below, and the network with them
            network = torch.compile(model)
    network = share_gradients(network)
    contrast = build_contrast(model.encoder, flags, contrast_settings, train_set, figures)
    strategy, source, throw = make_mask(*mask, flags, model.encoder, train_set, autocast)
    # All that learns has one optimizer. The run's own teacher is among the networks, because it is
    # part of the state; it has no gradients, so the optimizer leaves it alone.
    networks = {"model": model, **source.networks()}
    if contrast:
        networks["contrast"] = contrast
    optimizer = train.make_optimizer(nn.ModuleDict(networks).to(device), peak_lr, WEIGHT_DECAY)
    # Only encoder and decoder are clipped. Pooler, projector and the heads beside them have
    # gradients of another size: in one norm they would shrink the step of the encoder.
    clipped = [w for name, w in model.named_parameters() if not name.startswith(UNCLIPPED)]
    contrast_net = share_gradients(contrast)
    # Only now, so that names in state.pt lack the "module." of DistributedDataParallel.
    source.predictor = share_gradients(source.predictor)

    target_options = {"norm_pix": not flags.no_norm_pix, "floor": FLOOR}
    error_of = absolute_error if kind is SimMIM else None  # None: the squared error of MAE
    count = sum(w.numel() for w in model.parameters()) / 1e6
    print(
        f"machine  {train.machine(device)}\n"
        f"         {flags.dtype}: {reason}; kernels in {kernels.choose_impl('auto', device)}\n"
        f"data     {flags.data}: {len(images)} train, {len(held_set['images'])} {flags.split} images\n"
        f"model    {flags.model}: {count:.1f} M parameters, {N} patches\n"
        f"recipe   {flags.batch_size * total:,} views; crops from {flags.min_crop:g} of the area, "
        f"contrast {flags.contrast}, flat weight {flags.flat_weight:g}\n"
        f"run      {flags.out}: {flags.mask}, ratio {flags.ratio}, seed {flags.seed}, {flags.epochs} "
        f"epochs, an evaluation every {flags.eval_every}"
    )
    state = networks | {"optimizer": optimizer, "source": source}
    run = train.Run(flags, state, total, per_epoch, device)
    run.resume_or_begin()
    splits = (train_set, held_set)
    if run.writes and run.step == 0:
        log_evaluation(run, model, source.teacher, splits, target_options, autocast)

    # A step has six parts. The loop below (`for epoch`) has 1, 2 and 6: read it first. Parts 3 to 5 are
    # the functions `losses` and `update`, because a GPU can compile the one, and replay the other as a
    # recording. What changes from step to step, such as t or the learning rate, has to be an argument
    # of theirs: a recording would keep the number that it has seen first.

    def losses(view, ids_keep, ids_mask, *second):
        """Parts 3 and 4 of a step.

        view u8 (b, s, s, 3), ids_keep (b, K), ids_mask (b, M); second: what `contrast.draw` drew, in
        steps that have the contrastive loss.
        -> the loss of the MAE; its sum with the losses of the statistics and of the contrast; errors
        (b, M); two numbers of the contrastive loss
        """
        # 3. forward
        # An MAE is cheap because its encoder reads visible patches alone (SimMIM reads all).
        # patches (b, K, p*p*3), and mean and log std of each (b, K, 2)
        visible, visible_stats = masked_patch_gather(
            view, ids_keep, p, dtype, return_stats=True, floor=target_options["floor"]
        )
        with autocast():
            # pred (b, M, p*p*3), stats (b, M, 2), tokens (b, 1+K, D), which SimMIM lacks
            pred, stats, tokens = network(visible, ids_keep, ids_mask)

        # 4. loss
        error, hidden_stats = reconstruction_error(  # (b, M), (b, M, 2)
            pred, view, ids_mask, p, **target_options, error_of=error_of
        )
        # A drawing is mostly flat colour, which is easy to predict, so it weighs little.
        weight = detail_weight(patch_detail(view, ids_mask, p), flags.flat_weight)  # (b, M)
        loss = weighted_mean(error, weight)
        # norm_pix normalises the target, so pred lacks each patch's mean and standard deviation,
        # but a picture needs them. They are estimated from visible neighbours, and stats corrects
        # the estimate. Its head reads detached features, so it changes nothing else.
        g = s // p  # patches of a row of the view
        predicted = predicted_stats(stats, visible_stats, ids_keep, ids_mask, g)
        other_losses = stats_loss(predicted, hidden_stats)

        # 4b. contrastive loss: does the pooler, or the CLS token, find the other view of an image?
        for_log = None
        if second:
            # Of the m second views only the tokens are needed, so the encoder runs alone.
            *drawn, groups = second
            second_view, second_ids = contrast.second_views(*drawn, ids_keep.shape[1])
            second_visible = masked_patch_gather(second_view, second_ids, p, dtype)
            with torch.set_grad_enabled(contrast.trains_encoder), autocast():
                second_tokens = model.encoder(second_visible, second_ids)  # (m, 1+K, D)
            contrastive, for_log = contrast_net(tokens, second_tokens, groups)
            other_losses = other_losses + contrastive
        return loss.detach(), loss + other_losses, error.detach(), for_log

    def update(lr, view, ids_keep, ids_mask, *second):
        """Parts 3 to 5 of a step: losses, gradients, new weights.

        -> the loss of the MAE, the norm of its gradient, two numbers of the contrastive loss
        """
        loss, sum_of_losses, error, for_log = losses(view, ids_keep, ids_mask, *second)
        # source.loss: for --mask learned, a small network learns to predict these errors; else it is 0.
        # All losses share a backward pass. Beside the MAE's, only --contrast cls reaches the encoder.
        (sum_of_losses + source.loss(ids_mask, error)).backward()

        # 5. update
        grad_norm = nn.utils.clip_grad_norm_(clipped, CLIP)
        train.set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        return loss, grad_norm, for_log

    cut_views = data.view_images
    if compiling:
        cut_views = torch.compile(cut_views)
        no_graph = why_no_graph(flags, device, world, source, optimizer)
        if world == 1:
            # Where the whole update can't be one CUDA graph, torch records forward and backward as graphs
            # by itself (reduce-overhead). One graph can't be recorded within another.
            losses = torch.compile(losses, mode="reduce-overhead" if no_graph else None)
        if no_graph:
            print(f"note     no CUDA graph of the whole update {no_graph}")
        else:
            update = Replayed(update, optimizer, device)
    last_for_log = None  # two numbers of the contrastive loss, in the last step that had it

    for epoch in range(run.step // per_epoch, flags.epochs):
        refresh_maps(source, epoch, run, train_set["images"], autocast)
        # Every process goes through the same order, and takes each world-th image of it.
        order = data.epoch_order(len(images), flags.seed, epoch)[: per_epoch * b * world]
        order = order[rank::world]
        # A resumed run may begin within an epoch: it skips the batches that it has seen.
        for index, batch in data.batches(images, order, b, device, run.step % per_epoch):
            # 1. a view of each image
            # index (b,): numbers of the images; batch u8 (b, S, S, 3): whole images, as stored.
            # Crops, flips and noise are drawn on the CPU from these four, so that a GPU and a laptop
            # see the same crops, and a resumed run sees those that it would have seen.
            stream = (flags.seed, epoch, run.step, rank)
            generator = train.seeded_step(*stream)
            boxes, flip, noise = draw(generator, b, N, flags.min_crop, device)
            view = cut_views(batch, boxes, flip, s)  # (b, s, s, 3)
            # Colours may be changed here: data.jitter_colour(view, torch.rand(b, 3, generator=generator),
            # 0.3). What moves pixels would have to move the scores below, too.

            # 2. which patches are hidden
            t = run.step / total  # progress of the run: a curriculum depends on it
            K = masking.kept(N, ratio_at(flags.ratio, t, stream))
            thrown = round(throw * N)  # patches that are neither seen nor predicted
            M = N - K - thrown
            # {name: (b, N)}; of parts, a share for each; or the view, for strategies that read pixels
            scores = source.scores(index, boxes, flip, view)
            # The noise alone would be random masking: a strategy decides how far a score may overrule it.
            priority = strategy(scores, noise, t, M)  # (b, N): the highest M are hidden
            ids_keep, ids_mask = masking.sample(priority, K, thrown)  # (b, K), (b, M)

            # 3. to 5. forward, loss, update: the two functions above
            second = []
            if contrast and run.step % contrast_settings["every"] == 0:
                # A seed of its own: with and without this loss, the MAE sees the same crops.
                generator = train.seeded(*stream, SECOND_STREAM)
                second = contrast.draw(batch, index, generator)
            lr = train.lr_at(run.step, total, WARMUP * total, peak_lr)
            loss, grad_norm, for_log = update(lr, view, ids_keep, ids_mask, *second)
            if second:
                last_for_log = for_log.clone()  # a replayed graph writes the next ones over these
            source.update_teacher(model.encoder, run.step, total)
            run.update(loss, grad_norm)  # from here on, run.step counts this step, too
            if run.step == 1:
                train.name_unused(nn.ModuleDict(networks), optimizer)

            # 6. log, evaluate, save
            stop_together(run)
            if run.logs_now:
                check_priority(priority, flags.mask)
                numbers = contrast.statistics(last_for_log) if contrast else {}
                run.log_step(lr=lr, **numbers)
            if run.writes and (run.step % (per_epoch * flags.eval_every) == 0 or run.step == total):
                draw_masks(run.out, view, scores, priority, ids_keep, p)
                log_evaluation(run, model, source.teacher, splits, target_options, autocast)
            run.save_if_due()  # at most every two minutes, behind a row; after Ctrl-C, it exits here
    finish(run, model, source, held_set, target_options, autocast)


if __name__ == "__main__":
    cli(main)
