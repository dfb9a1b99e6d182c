"""How fast the kernels are in a step, beside their PyTorch references and torch.compile of those.

    python -m lab.bench_kernels

Two parts of a step are timed: the gather of visible patches, and the whole loss (detail of each
patch, weight, error, statistics, and the gradients). On a GPU they are replays of a CUDA graph over
several inputs in turn, so that no time contains Python or finds its input in a cache. What
surrounds our kernels is compiled, as in pretrain.py.

Writes runs/bench/bench_kernels.csv. The gate comes first: the numbers of every contender against
those of the reference, which tests/lesson/test_kernels.py compares with float64. A wrong one ends
the run before any speed. Bytes are the least that any implementation moves. Their share is of a
plain copy in the same run. Without a GPU, --small tries the path on the references.
"""

import functools

import torch

import mask as masking
from common.train import DTYPES, UserError, cli, pick_device
from kernels.patches import (
    TRITON,
    detail_weight,
    masked_patch_gather,
    patch_detail,
    predicted_stats,
    reconstruction_error,
    stats_loss,
    weighted_mean,
)
from lab import bench

# batch, image size, patch size, share of hidden patches
GPU_CASES = [(1024, *case, 0.75) for case in ((128, 16), (224, 16), (64, 8), (224, 14))]
SMALL_CASES = [(2, 32, 8, 0.75)]
INPUTS = 4  # that take turns
FLAT_WEIGHT = 0.1  # of pretrain.py
# How often the least implementation moves a patch's pixels with their place, its P numbers of the
# dtype, and a single number of fp32: the gather writes two statistics; the loss reads the
# prediction and two statistics, and writes their gradients.
MOVES = {"gather": (1, 1, 2), "loss": (1, 2, 4)}
DTYPES = DTYPES | {"fp16": torch.float16}
KEYS = ("batch", "size", "patch", "ratio", "operation", "impl", "dtype")


# ---- the contenders ------------------------------------------------------------------------------


def losses(pred, stats, view, keep, mask, patch, seen, impl):
    """What pretrain.py computes of a prediction; seen (B, K, 2): statistics of visible patches."""
    error, true = reconstruction_error(pred, view, mask, patch, impl=impl)
    weight = detail_weight(patch_detail(view, mask, patch, impl=impl), FLAT_WEIGHT)
    predicted = predicted_stats(stats, seen, keep, mask, view.shape[1] // patch)
    return weighted_mean(error, weight) + stats_loss(predicted, true)


def contenders(device):
    """{name: (gather, losses)}; without a GPU the references alone."""
    gather = functools.partial(masked_patch_gather, return_stats=True)
    with_impl = {
        impl: [functools.partial(f, impl=impl) for f in (gather, losses)]
        for impl in ("torch", "triton")
    }
    found = {"reference": with_impl["torch"]}
    if device.type == "cuda":
        found["compile"] = [torch.compile(f, dynamic=False) for f in with_impl["torch"]]
        if TRITON:
            found["triton"] = [torch.compile(f, dynamic=False) for f in with_impl["triton"]]
    return found


def inputs(case, dtype, device, seed=0):
    """-> pred, stats, view, ids_keep, ids_mask, patch, statistics of visible patches."""
    batch, size, patch, ratio = case
    torch.manual_seed(seed)
    N = (size // patch) ** 2
    view = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    keep, mask = masking.sample(torch.rand(batch, N, device=device), masking.kept(N, ratio))
    pred = torch.randn(*mask.shape, patch * patch * 3, device=device, dtype=dtype).requires_grad_()
    stats = torch.randn(*mask.shape, 2, device=device, dtype=dtype).requires_grad_()
    _, seen = masked_patch_gather(view, keep, patch, return_stats=True, impl="torch")
    return pred, stats, view, keep, mask, patch, seen


def run(operation, functions, given):
    """-> what the operation computes: patches and statistics, or the loss and its two gradients."""
    gather, losses = functions
    pred, stats, view, keep, mask, patch, _ = given
    if operation == "gather":
        return gather(view, keep, patch, pred.dtype)
    loss = losses(*given)
    # The sum over patches, and not their mean: in fp16 that would have no gradient.
    return loss.detach(), *torch.autograd.grad(loss * mask.numel(), (pred, stats))


def bytes_to_move(operation, n, P, size):
    """The least bytes that any implementation moves for n patches of P numbers of `size` bytes."""
    pixels, numbers, single = MOVES[operation]
    return n * (pixels * (P + 8) + numbers * P * size + single * 4)


# ---- rows ----------------------------------------------------------------------------------------


def check(name, found, truth):
    """A UserError where numbers are off by more than a unit in the last place of their dtype."""
    for x, true in zip(found, truth, strict=True):
        off = (x.double() - true.double()).abs().max() / true.double().abs().max()
        if not off <= max(torch.finfo(x.dtype).eps, 1e-5):
            where = f"{name} is off by {off:.1e} of the largest value"
            raise UserError(f"{where}; no speed is reported")


def measure(table, case, operation, sets, turns):
    """Time all contenders in turns, and add a row for each."""
    pred, _, view, keep, mask, _, _ = sets[0]
    device, dtype = view.device, pred.dtype
    found = contenders(device)
    keys = {}
    for name in found:
        keys[name] = dict(zip(KEYS, (*case, operation, name, str(dtype)[6:]), strict=True))
    truth = run(operation, found["reference"], sets[0])
    replays = {}
    for name, functions in found.items():
        try:
            check(f"{name} {operation} of {case}", run(operation, functions, sets[0]), truth)
            calls = [functools.partial(run, operation, functions, given) for given in sets]
            replays[name] = bench.replays(calls, device)
        except torch.OutOfMemoryError:
            table.add(keys[name] | {"note": "does not fit in this GPU's memory"})
    times = bench.in_turns(replays, turns)
    n = (keep if operation == "gather" else mask).numel()
    moved = bytes_to_move(operation, n, pred.shape[2], pred.element_size())
    base = "compile" if "compile" in times else "reference"
    for name, columns in bench.compared(times, base).items():
        speed = moved / columns["p50_ms"] / 1e6
        share = round(speed / table.where["copy_gb_per_s"], 3)
        more = {"mb_to_move": round(moved / 1e6, 2), "gb_per_s": round(speed, 1)}
        table.add(keys[name] | columns | more | {"share_of_copy": share})


def main():
    parser = bench.parser_of(__doc__)
    parser.add_argument("--dtype", choices=DTYPES, help="of patches (bf16, on a CPU fp32)")
    args = parser.parse_args()
    device = pick_device(args.device)
    gpu = device.type == "cuda"
    if not (gpu or args.small):
        raise UserError("the kernels are for NVIDIA cards; --small tries the path without one")
    dtype = DTYPES[args.dtype or ("bf16" if gpu else "fp32")]
    versions = {"triton": bench.version_of("triton")}
    versions["copy_gb_per_s"] = round(bench.copy_speed(device) / 1e9, 1)
    table = bench.Table(args.out / "bench_kernels.csv", device, **versions)
    for case in SMALL_CASES if args.small else GPU_CASES:
        sets = [inputs(case, dtype, device, seed) for seed in range(INPUTS)]
        for operation in MOVES:
            torch.compiler.reset()
            measure(table, case, operation, sets, args.turns)
    print(f"wrote    {table.path}")


if __name__ == "__main__":
    cli(main)
