"""One candidate of benchmarks/train.py in a process of its own: a network, its training step, and answers on demand.

It warms up, sends its losses, and then answers each ("steps" or "phases", count) that comes through
its pipe.
"""

import contextlib
import functools
import statistics
import time

import torch

import data
import mask as masking
from benchmarks import DTYPES, now
from common.checkpoints import init_from
from common.train import autocast_of, keep_freed_memory, make_optimizer, peak_memory_mb, seeded
from kernels.gather import SCALE, SHIFT, masked_patch_gather
from kernels.loss import detail_weight, patch_detail, reconstruction_loss, stats_loss
from model import MAE, SIZES

PHASES = ("data", "gather", "encoder", "decoder", "loss", "optimizer")
FLOOR = 1e-3  # under a patch's std: that of transformers, sqrt(1e-6), so that both do the same


def fixed_views(case, device):
    """views u8 (B, S, S, 3), smooth and noisy places both, and noise (8, B, N): the same in every
    process.
    """
    draws, B, S = seeded(0), case["batch"], case["image_size"]
    coarse = torch.rand(B, 3, 7, 7, generator=draws)
    smooth = torch.nn.functional.interpolate(coarse, (S, S), mode="bilinear")
    grain = torch.rand(B, 3, S, S, generator=draws)
    view = (255 * (0.8 * smooth + 0.2 * grain)).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    noise = torch.rand(8, B, (S // case["patch_size"]) ** 2, generator=draws)
    return view.to(device), noise.to(device)


def our_loss(case, net, view, noise, dtype, autocast, mark):
    """-> loss(i), on the device, of what pretrain.py does with a view, under the loss of the paper."""
    p, K = case["patch_size"], masking.kept(noise.shape[2], case["ratio"])

    def loss(i):
        ids_keep, ids_mask = masking.sample(noise[i % len(noise)], K)
        tokens = masked_patch_gather(view, ids_keep, p, dtype)
        with autocast():
            pred, _, _ = net(tokens, ids_keep, ids_mask)
        return reconstruction_loss(pred, view, ids_mask, p, floor=FLOOR)

    return loss


def their_loss(case, net, view, noise, dtype, autocast, mark):
    """-> loss(i) of ViTMAEForPreTraining, which takes normalised pixels (B, 3, S, S)."""
    scale, shift = (torch.tensor(v, device=view.device).view(3, 1, 1) for v in (SCALE, SHIFT))

    def loss(i):
        pixels = (
            view.permute(0, 3, 1, 2)
            .to(torch.float32, memory_format=torch.contiguous_format)
            .mul_(scale)
        )
        with autocast():
            return net(pixel_values=pixels.add_(shift), noise=noise[i % len(noise)]).loss

    return loss


def whole_loss(case, net, view, noise, dtype, autocast, mark):
    """-> loss(i) with all that pretrain.py does for it; mark(phase) is called as each phase of the
    step ends.

    The backward pass is split by hooks: the gradient of the prediction ends the loss, that of the
    latent the decoder.
    """
    device, B, p = view.device, case["batch"], case["patch_size"]
    images, K = (
        view.cpu().numpy() if device.type == "cpu" else view,
        masking.kept(noise.shape[2], case["ratio"]),
    )

    def loss(i):
        draws = seeded(0, i)
        random = (*data.draw_boxes(B, draws, 0.4), masking.gumbel_noise(B, noise.shape[2], draws))
        boxes, flip, own = (data.send(x, device) for x in random)
        batch = data.take(images, torch.randperm(B, generator=draws), device)
        seen = data.view_images(batch, boxes, flip, case["image_size"])
        mark("data")
        ids_keep, ids_mask = masking.sample(own, K)
        tokens = masked_patch_gather(seen, ids_keep, p, dtype)
        mark("gather")
        with autocast():
            latent = net.encoder(tokens, ids_keep)
            mark("encoder")
            pred, stats = net.decoder(latent, ids_keep, ids_mask)
        mark("decoder")
        pred.register_hook(lambda _: mark("loss"))
        latent.register_hook(lambda _: mark("decoder"))
        weight = detail_weight(patch_detail(seen, ids_mask, p), 0.1)
        error = reconstruction_loss(pred, seen, ids_mask, p, weight)
        return error + stats_loss(stats, seen, ids_keep, ids_mask, p)

    return loss


def training_step(make_loss, net, optimizer, clip, mark=lambda phase: None):
    """-> step(i): an update -> its loss, on the device."""
    loss_of = make_loss(mark)

    def step(i):
        loss = loss_of(i)
        loss.backward()
        mark("encoder")
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mark("optimizer")
        return loss.detach()

    return step


def make_step(case, device):
    """-> a function that makes the candidate's step(i), from the weights that all start with."""
    whole, dtype = case.get("whole", False), DTYPES[case["dtype"]]
    if case["net"] == "hf":
        from transformers import ViTMAEForPreTraining

        how = {"attn_implementation": case["attention"]} if "attention" in case else {}
        net = ViTMAEForPreTraining.from_pretrained(case["weights"] + "-hf", **how)
        net.config.norm_pix_loss, net.config.mask_ratio, make_loss = True, case["ratio"], their_loss
        for (
            name,
            weight,
        ) in net.named_parameters():  # fixed in MAE; from_pretrained (5.23) makes them learn
            weight.requires_grad_("position" not in name and "pos_embed" not in name)
    else:
        net, make_loss = build(case), whole_loss if whole else our_loss
        init_from(net, case["weights"] + ".safetensors")
    net.train().to(device)
    if case.get("fused", True):
        optimizer = make_optimizer(net, 1e-4, 0.05)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.05)
    net = torch.compile(net) if case.get("compile") else net
    views, autocast = fixed_views(case, device), autocast_of(device, dtype)
    make_loss = functools.partial(make_loss, case, net, *views, dtype, autocast)
    return functools.partial(training_step, make_loss, net, optimizer, whole)


def build(case):
    size = {k: SIZES[case["model"]][k] for k in ("dim", "depth", "heads")}
    width, depth = case["decoder"]
    return MAE(
        case["image_size"], case["patch_size"], **size, decoder_dim=width, decoder_depth=depth
    )


def multiply_step(case, device):
    """-> step(i): a plain product of two square matrices, to which MFU compares."""
    a = torch.randn(case["side"], case["side"], device=device).to(DTYPES[case["dtype"]])
    out = torch.empty_like(a)
    return lambda i: torch.mm(a, a, out=out)[0, 0]


def waits(step, device):
    """-> what in a step makes the host wait for the GPU, "" if nothing does; "" on a CPU."""
    if device.type != "cuda":
        return ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(0)
    except RuntimeError as problem:
        return str(problem).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def timed_phases(make, device, steps):
    """-> {phase: milliseconds of a step}; steps are run one by one, so the host's own time counts."""
    marks, gpu = [], device.type == "cuda"

    def mark(phase):
        moment = torch.cuda.Event(enable_timing=True) if gpu else time.perf_counter()
        if gpu:
            moment.record()
        marks.append((phase, moment))

    step, times = make(mark=mark), {phase: [] for phase in PHASES}
    for i in range(steps + 1):
        marks.clear()
        mark("begin")
        step(i)
        now(device)  # a GPU's events are there
        spent = dict.fromkeys(PHASES, 0.0)
        for (_, a), (phase, b) in zip(marks, marks[1:], strict=False):
            spent[phase] += a.elapsed_time(b) if gpu else 1000 * (b - a)
        for phase, ms in spent.items() if i else ():  # the first step warms up
            times[phase].append(ms)
    return {phase: round(statistics.median(ms), 3) for phase, ms in times.items()}


def timed_steps(step, device, steps):
    """-> how long so many steps take, and the most memory that was held so far."""
    start_time = now(device)
    for i in range(steps):
        step(i)
    return {"seconds": now(device) - start_time, "peak_mb": peak_memory_mb(device)}


def serve(case, pipe):
    """The life of the process: warm up, send the losses, answer until nobody asks any more."""
    if case.get("keep", True):
        keep_freed_memory()
    device = torch.device(case["device"])
    make = (
        functools.partial(multiply_step, case, device)
        if case["net"] == "matmul"
        else make_step(case, device)
    )
    step = make()
    losses = [float(step(i)) for i in range(case["warmup"])]
    pipe.send({"losses": losses, "waits": waits(step, device) if case["net"] == "ours" else ""})
    with contextlib.suppress(EOFError):
        while True:
            what, count = pipe.recv()
            pipe.send(
                timed_phases(make, device, count)
                if what == "phases"
                else timed_steps(step, device, count)
            )
