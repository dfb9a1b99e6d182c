"""How fast the two kernels are, beside the obvious PyTorch and torch.compile of it.

    python -m lab.bench_kernels [--gate]

Writes runs/bench/bench_kernels.csv on a GPU. Without one it measures the PyTorch references, into
bench_kernels_cpu.csv. The gate comes first: every contender against float64 on small inputs, then
against the reference on the inputs that are timed. A wrong number ends the run before any speed.

Bytes are the least that any implementation moves. Their share is of a plain copy in the same run.
Forward is that of training: there our kernel writes the gradient already, which backward scales.
Times of small inputs on a GPU contain the launch by Python.
"""

import functools

import torch
import torch._functorch.config as functorch

from common.command import cli
from common.io import UserError
from common.train import DTYPES, pick_device
from kernels import INTERPRET
from kernels.gather import MEAN, STD, masked_patch_gather
from kernels.loss import patch_detail, reconstruction_loss
from lab import bench

# batch, image size, patch size, share of hidden patches
SIZES = [(64, 8, 0.75), (128, 16, 0.75), (224, 16, 0.75), (224, 16, 0.5), (224, 16, 0.9)]
GPU_CASES = [(1024, *size) for size in SIZES]
CPU_CASES = [(128, 96, 8, 0.75), (32, 224, 16, 0.75)]
SMALL_CASES = [(2, 32, 8, 0.75)]
GATE_CASES = [(4, 64, 16, 0.75), (3, 48, 8, 0.5), (2, 84, 14, 0.9)]
# What is timed: an operation, a part of it, and how often the least implementation moves a patch's
# pixels with their place, its P numbers of the dtype, and a single number.
PASSES = {
    ("gather", "forward"): (1, 1, 0),
    ("detail", "forward"): (1, 0, 1),
    ("loss", "forward"): (1, 1, 1),  # reads the prediction and a weight
    ("loss", "backward"): (0, 2, 0),  # reads as much as the prediction, writes the gradient
    ("loss", "both"): (1, 2, 1),
}
KEYS = ("batch", "size", "patch", "ratio", "operation", "pass", "impl", "dtype")


# ---- the obvious way, as it is written most often; in float64 it is the truth --------------------


def pick_patches(x, ids, patch):
    """x (B, S, S, 3) -> of all its patches those at ids (B, K), (B, K, P)."""
    B, S, _, C = x.shape
    g = S // patch
    x = x.view(B, g, patch, g, patch, C).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(B, g * g, patch * patch * C)
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


def obvious_gather(view, ids, patch, dtype=torch.float32):
    exact = torch.promote_types(dtype, torch.float32)
    mean, std = torch.tensor([MEAN, STD], device=view.device, dtype=exact)  # as torchvision does
    return pick_patches((view.to(exact) / 255 - mean) / std, ids, patch).to(dtype)


def obvious_detail(view, ids, patch, dtype=torch.float32):
    x = pick_patches(view.to(dtype) / 255, ids, patch).unflatten(2, (-1, 3))
    return x.var(2, correction=0).mean(2).sqrt()


def obvious_loss(pred, view, ids, patch, weight):
    target = obvious_gather(view, ids, patch, torch.promote_types(pred.dtype, torch.float32))
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - mean) / (var + 0.15**2) ** 0.5
    error = ((pred.to(target.dtype) - target) ** 2).mean(-1)
    return (error * weight).sum() / weight.sum()


def contenders(device, timed=True):
    """{name: (gather, detail, loss)}. The interpreter of Triton is judged, but never timed."""
    ours = (masked_patch_gather, patch_detail, reconstruction_loss)
    found = {"reference": [functools.partial(f, impl="torch") for f in ours]}
    found["obvious"] = [obvious_gather, obvious_detail, obvious_loss]
    if device.type == "cuda":
        found["compile"] = [torch.compile(f, dynamic=False) for f in found["obvious"]]
    if bench.TRITON != "none" and (device.type == "cuda" or (INTERPRET and not timed)):
        found["triton"] = [functools.partial(f, impl="triton") for f in ours]
    return found


# ---- one case ------------------------------------------------------------------------------------


def inputs(case, dtype, device):
    """-> view, ids_keep, ids_mask, pred, weight, patch; random, the same every time."""
    batch, size, patch, ratio = case
    torch.manual_seed(0)
    N = (size // patch) ** 2
    K = int(N * (1 - ratio) + 1e-9)
    view = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    order = torch.rand(batch, N, device=device).argsort(1)
    keep = order[:, :K].contiguous()
    mask = order[:, K:].contiguous()
    pred = torch.randn(batch, N - K, patch * patch * 3, device=device, dtype=dtype).requires_grad_()
    return view, keep, mask, pred, torch.rand(batch, N - K, device=device), patch


def call_of(functions, given, operation, which):
    """-> what is timed, without arguments. Backward alone gets a graph that stays."""
    gather, detail, loss = functions
    view, keep, mask, pred, weight, patch = given
    if operation == "gather":
        return functools.partial(gather, view, keep, patch, pred.dtype)
    if operation == "detail":
        return functools.partial(detail, view, mask, patch)
    forward = functools.partial(loss, pred, view, mask, patch, weight)
    if which == "forward":
        return forward
    graph = forward() if which == "backward" else None

    def gradient():
        pred.grad = None
        (forward() if graph is None else graph).backward(retain_graph=graph is not None)
        return pred.grad

    return gradient


def bytes_to_move(one, n, P, size):
    """The least bytes that any implementation moves for n patches of P numbers of `size` bytes."""
    pixels, numbers, single = PASSES[one]
    return n * (pixels * (P + 8) + numbers * P * size + single * 4)


# ---- the gate ------------------------------------------------------------------------------------


def check(what, found, truth, dtype):
    """A UserError where numbers are off by more than the rounding of their dtype."""
    rounding = 2**-7 if INTERPRET else 2**-8  # of bf16, which the interpreter cuts off
    limit = rounding if found.dtype == dtype == torch.bfloat16 else 1e-5
    exact = torch.promote_types(truth.dtype, torch.float32)
    off = (found.detach().to(exact) - truth.to(exact)).abs().max() / truth.abs().max()
    if not off <= limit:
        raise UserError(f"{what} is off by {off:.1e} of the largest value; no speed is reported")


def gate(device, dtype):
    """Every contender's numbers, on small inputs, against the obvious way in float64."""
    for case in GATE_CASES:
        given = inputs(case, dtype, device)
        view, keep, mask, pred, weight, patch = given
        exact = pred.detach().double().requires_grad_()
        exact_given = (view, keep, mask, exact, weight.double(), patch)
        obvious = [obvious_gather, functools.partial(obvious_detail, dtype=torch.float64)]
        for name, functions in contenders(device, timed=False).items():
            for one in PASSES:
                truth = call_of([*obvious, obvious_loss], exact_given, *one)()
                found = call_of(functions, given, *one)()
                check(f"{name} {' '.join(one)} of {case}", found, truth, dtype)
    names = ", ".join(contenders(device, timed=False))
    print(f"gate     green: {names} agree with float64 in {str(dtype)[6:]}", flush=True)


# ---- rows ----------------------------------------------------------------------------------------


def measure(table, case, one, given, found, turns):
    """Time all contenders of one pass in turns, and add a row for each, unless the table has it."""
    device, dtype = given[0].device, given[3].dtype
    keys = {
        name: dict(zip(KEYS, (*case, *one, name, str(dtype)[6:]), strict=True)) for name in found
    }
    if all(table.find(**row) for row in keys.values()):
        return
    truth = call_of(found["reference"], given, *one)().detach().clone()
    calls = {}
    for name, functions in found.items():
        try:
            answer = call_of(functions, given, *one)()
            check(f"{name} {' '.join(one)} of {case}", answer, truth, dtype)
            calls[name] = functools.partial(call_of, functions, given, *one)
        except torch.OutOfMemoryError:
            table.add(keys[name] | {"note": "does not fit in this GPU's memory"})
    truth = answer = None
    times = bench.in_turns(calls, turns, lambda make: bench.milliseconds(make(), device))
    n = (given[1] if one[0] == "gather" else given[2]).numel()
    moved = bytes_to_move(one, n, given[3].shape[2], given[3].element_size())
    for name, columns in bench.compared(times, "reference").items():
        speed = moved / columns["p50_ms"] / 1e6
        share = round(speed / table.where["copy_gb_per_s"], 3)
        more = {"mb_to_move": round(moved / 1e6, 2), "gb_per_s": round(speed, 1)}
        table.add(keys[name] | columns | more | {"share_of_copy": share})


def main():
    parser = bench.parser_of(__doc__)
    parser.add_argument("--dtype", choices=DTYPES, help="of patches (bf16, on a CPU fp32)")
    parser.add_argument("--gate", action="store_true", help="only the gate")
    args = parser.parse_args()
    device = pick_device(args.device)
    gpu = device.type == "cuda"
    dtype = DTYPES[args.dtype or ("bf16" if gpu else "fp32")]
    functorch.donated_buffer = False  # else a compiled graph runs backward only once
    gate(device, dtype)
    if args.gate:
        return
    path = args.out / ("bench_kernels.csv" if gpu else "bench_kernels_cpu.csv")
    copy = {"copy_gb_per_s": round(bench.copy_speed(device) / 1e9, 1)}
    table = bench.Table(path, KEYS, device, triton=bench.TRITON, **copy)
    if not gpu:
        print("note: no GPU here, so the PyTorch references are measured, not the kernels")
    for case in SMALL_CASES if args.small else GPU_CASES if gpu else CPU_CASES:
        torch.compiler.reset()
        found = contenders(device)
        given = inputs(case, dtype, device)
        for one in PASSES:
            measure(table, case, one, given, found, args.turns)
    print(f"wrote    {path}")


if __name__ == "__main__":
    cli(main)
