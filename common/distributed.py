"""Several processes, a GPU each, as one: torchrun --nproc-per-node N STAGE ...

Each process (a rank, of `world` ranks) holds the whole network and works on its slice of every
batch. What belongs to the whole batch is summed: weights of the loss, losses, gradients. Alone,
each of these functions does nothing.
"""

import contextlib
import datetime
import os
import shlex
import signal
import sys

import torch
import torch.distributed as dist

from common.command import launched
from common.io import UserError


def join(device):
    """Meet the processes that torchrun started -> (rank, world, device); (0, 1, device) where there
    is only this one.

    A GPU each, NCCL between them; CPU tensors go by gloo. All but rank 0 fall silent: what they
    print is dropped.
    """
    if not launched() or os.environ["WORLD_SIZE"] == "1":
        return 0, 1, device
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} has no GPU: there are {torch.cuda.device_count()}; torchrun "
                f"--nproc-per-node {torch.cuda.device_count()} starts one for each"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(
            f"several processes work on cuda or cpu, not on {device.type}; run python without torchrun"
        )
    hours = datetime.timedelta(hours=6)  # the others wait while rank 0 packs or evaluates
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=hours
    )
    rank, world = place()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return rank, world, device


def several():
    """Whether this process is one of several that have met."""
    return dist.is_available() and dist.is_initialized()


def place():
    """-> (rank, world): which of how many processes this is; (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)


def all_reduce(x, op="SUM"):
    """x of every process, summed in place in all of them -> x. A process that is gone is a
    UserError in the others.
    """
    if several():
        try:
            dist.all_reduce(x, getattr(dist.ReduceOp, op))
        except RuntimeError as problem:
            reason = (str(problem).splitlines() or ["no reason given"])[0][:100]
            raise UserError(
                f"another process of this run has ended ({reason}); its own message says why. "
                "The same command and --resume go on from the last checkpoint"
            ) from None
    return x


def all_reduce_gradients(parameters):
    """Sum the gradients over all processes, in one message; called once a step, after the last
    backward.

    DistributedDataParallel would hide the message behind the backward pass, at the price of hooks,
    buckets, averages and rules about unused weights and accumulation. A ring moves 2 (R-1)/R times
    the bytes over each link: for ViT-B (.45 GB) 2.6 ms at 300 GB/s and .6 ms more to pack and
    unpack, computed, not measured; a step takes some 100 ms. All ranks get the same bits, so their
    weights stay the same.
    """
    gradients = [w.grad for w in parameters if w.grad is not None]
    if several() and gradients:
        flat = all_reduce(torch.cat([g.flatten() for g in gradients]))
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(
            gradients, [x.view_as(g) for x, g in zip(parts, gradients, strict=True)]
        )


def all_rows(x):
    """x (b, ...) of every process -> (world * b, ...), the slices in the order of the ranks."""
    if not several():
        return x
    rank, world = place()
    whole = x.new_zeros(world, *x.shape)
    whole[rank] = x
    return all_reduce(whole).flatten(0, 1)


def with_others(x):
    """x (b, ...) of every process -> (world * b, ...), where only this process's rows carry a
    gradient.

    What is small and needs the whole batch, such as a batch norm and a head, is then computed by
    every process, all of them alike, and needs no summing; what made x gets the gradient of its own
    rows.
    """
    if not several():
        return x
    at, whole = place()[0] * len(x), all_rows(x.detach())
    return torch.cat([whole[:at], x, whole[at + len(x) :]])


def largest(number):
    """The largest of a small whole number over all processes: a signal that one of them got. Waits
    for no GPU.
    """
    return int(all_reduce(torch.tensor(number), "MAX")) if several() else number


@contextlib.contextmanager
def zero_first():
    """with zero_first(): rank 0 does it, then all others: they find done what only one may do, such
    as packing.
    """
    rank, _ = place()
    if rank > 0:
        largest(0)
    yield
    if rank == 0:
        largest(0)


def leave():
    """Wait until all processes are here, then part: torchrun ends all as soon as one goes early.
    Rank 0 goes on.

    The others end at once, without Python's clean-up: gloo's threads were seen to abort in it.
    """
    if several():
        largest(0)
        rank, _ = place()
        dist.destroy_process_group()
        if rank > 0:
            sys.stderr.flush()
            os._exit(0)


def stop_here(number, step, resume):
    """Say how a run that signal `number` stopped goes on, and exit as that signal does (128 +
    number); 0: none came.
    """
    if number == 0:
        return
    how = f"torchrun --nproc-per-node {dist.get_world_size()}" if several() else "python"
    print(
        f"stopped by {signal.Signals(number).name} at step {step}, saved; go on with:\n"
        f"  {how} {shlex.join(sys.argv)}" + ("" if resume else " --resume"),
        flush=True,
    )
    leave()
    sys.exit(128 + number)
