"""How fast the two kernels are, beside the obvious PyTorch and torch.compile of it: python -m benchmarks.kernels

Writes runs/bench/bench_kernels.csv and .png on a GPU; without one bench_kernels_cpu.csv and .png,
where the PyTorch references are what is measured. Each number is checked against float64 before any
clock starts. A GPU's times are taken with a cold cache (triton.testing.do_bench); bytes are those
that have to move at the least, reads of images counted in the 32-byte sectors that memory delivers;
their share is of a plain copy, measured in the same run.
"""

import ctypes
import functools
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch

import kernels
from benchmarks import DTYPES, OUT, TRITON, about, status_mb
from common.command import Parser, at_least, claim, cli, refuse_idle
from common.io import UserError
from common.train import pick_device
from experiments.tables import save_csv
from kernels.gather import MEAN, STD, masked_patch_gather
from kernels.loss import patch_detail, reconstruction_loss

GPU_CASES = dict(batch=(256, 1024, 4096), size=(128, 224), patch=(8, 16), ratio=(0.5, 0.75, 0.9))
CPU_CASES = [(128, 96, 8, 0.75), (32, 224, 16, 0.75)]


# ---- the obvious way, as it is written most often; in float64 it is the truth --------------------


def pick_patches(x, ids, patch):
    """x (B, S, S, 3) -> of all its patches those at ids (B, K), (B, K, P)."""
    B, S, _, C = x.shape
    x = x.view(B, S // patch, patch, S // patch, patch, C).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(B, (S // patch) ** 2, patch * patch * C)
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


def obvious_gather(view, ids, patch, dtype=torch.float32):
    exact = torch.promote_types(dtype, torch.float32)
    mean, std = (torch.tensor(v, device=view.device, dtype=exact) for v in (MEAN, STD))
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


def contenders(device):
    """{name: (gather, detail, loss)}, all with the arguments of the functions above."""
    ours = (masked_patch_gather, patch_detail, reconstruction_loss)
    found = {"obvious": (obvious_gather, obvious_detail, obvious_loss)}
    found["reference"] = [functools.partial(f, impl="torch") for f in ours]
    if device.type == "cuda":
        found["compile"] = [torch.compile(f, dynamic=False) for f in found["obvious"]]
        found["triton"] = [functools.partial(f, impl="triton") for f in ours]
    return found


# ---- one case ------------------------------------------------------------------------------------


def inputs(batch, size, patch, ratio, dtype, device):
    """-> view, ids_keep, ids_mask, pred, weight; random, the same every time."""
    torch.manual_seed(0)
    N = (size // patch) ** 2
    K = int(N * (1 - ratio) + 1e-9)
    view = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    order = torch.rand(batch, N, device=device).argsort(1)
    keep, mask = order[:, :K].contiguous(), order[:, K:].contiguous()
    pred = torch.randn(batch, N - K, patch * patch * 3, device=device, dtype=dtype).requires_grad_()
    return view, keep, mask, pred, torch.rand(batch, N - K, device=device)


def calls(functions, view, keep, mask, pred, weight, patch):
    """-> {operation: a call of it}; the loss goes there and back."""
    gather, detail, loss = functions

    def there_and_back():
        pred.grad = None
        loss(pred, view, mask, patch, weight).backward()
        return pred.grad

    return {
        "gather": lambda: gather(view, keep, patch, pred.dtype),
        "detail": lambda: detail(view, mask, patch),
        "loss": there_and_back,
    }


def gate(device, dtype):
    """Every contender's numbers against the obvious way's in float64; a speed is never reported
    where one is wrong.
    """
    given = view, keep, mask, pred, weight = inputs(4, 64, 16, 0.75, dtype, device)
    exact = pred.detach().double().requires_grad_()
    obvious_loss(exact, view, mask, 16, weight.double()).backward()
    truth = {
        "gather": obvious_gather(view, keep, 16, torch.float64),
        "loss": exact.grad,
        "detail": obvious_detail(view, mask, 16, torch.float64),
    }
    for name, functions in contenders(device).items():
        for operation, call in calls(functions, *given, 16).items():
            off = (call().double() - truth[operation]).abs().max() / truth[operation].abs().max()
            if not off <= (1e-5 if dtype == torch.float32 or operation == "detail" else 2**-8):
                raise UserError(
                    f"{name} {operation} is off by {off:.1e} of the largest value; no speed is reported"
                )


def bytes_to_move(operation, view, keep, mask, pred, patch):
    """The least that has to cross the memory bus: sectors of the image once, everything else once."""
    ids, P, size = (keep if operation == "gather" else mask), pred.shape[2], pred.element_size()
    read = sectors(ids[:8], view.shape[1], patch) * len(ids) / len(ids[:8]) * 32 + ids.numel() * 8
    more = {"gather": P * size, "detail": 4, "loss": 2 * P * size + 8}[operation]  # a patch
    return read + ids.numel() * more


def sectors(ids, size, patch):
    """How many 32-byte sectors of their images the patches ids (B, K) touch, each counted once."""
    y, x = ids // (size // patch) * patch, ids % (size // patch) * patch
    rows = y[..., None] + torch.arange(patch, device=ids.device)  # (B, K, p)
    image = torch.arange(len(ids), device=ids.device)[:, None, None]
    first = (
        (image * size + rows) * size + x[..., None]
    ) * 3  # the address of each row's first byte
    touched = [(first + o) // 32 for o in (*range(0, patch * 3, 32), patch * 3 - 1)]
    return torch.stack(touched).unique().numel()


def milliseconds(call, device):
    """-> median, 20 % and 80 % of the time of a call."""
    if device.type == "cuda":
        return kernels.triton.testing.do_bench(call, warmup=50, rep=200, quantiles=(0.5, 0.2, 0.8))
    times, until = [], time.perf_counter() + 1.5
    while len(times) < 15 or time.perf_counter() < until:
        start_time = time.perf_counter()
        call()
        times.append((time.perf_counter() - start_time) * 1e3)
    return np.quantile(times[2:], (0.5, 0.2, 0.8)).tolist()


def peak_mb(call, device):
    """Most memory that a call holds beyond what was there before, its result included. Linux only
    where no GPU is.
    """
    if device.type == "cuda":
        call()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if sys.platform != "linux":
        return float("nan")
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: arrays go back to the system when they are freed
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status_mb("VmRSS")
    result = call()
    peak = status_mb("VmHWM") - before
    del result
    return peak


# ---- all of them ---------------------------------------------------------------------------------


def measure(cases, dtype, device, copy_gb_s):
    """-> one row for each case, contender and operation. Memory last: measuring it changes how
    malloc behaves.
    """
    rows, later = [], []
    for case in cases:
        torch.compiler.reset()
        given = inputs(*case, dtype, device)
        for name, functions in contenders(device).items():
            for operation, call in calls(functions, *given, case[2]).items():
                try:
                    median, low, high = milliseconds(call, device)
                except torch.cuda.OutOfMemoryError:
                    print(
                        f"{name} {operation} of {case} does not fit in this GPU's memory; left out"
                    )
                    continue
                moved = bytes_to_move(operation, *given[:4], case[2])
                speed = moved / median / 1e6
                row = dict(
                    zip(GPU_CASES, case, strict=True),
                    operation=operation,
                    impl=name,
                    dtype=str(dtype)[6:],
                    ms=round(median, 4),
                    ms_20=round(low, 4),
                    ms_80=round(high, 4),
                    mb_to_move=round(moved / 1e6, 2),
                    gb_per_s=round(speed, 1),
                    copy_share=round(speed / copy_gb_s, 3),
                )
                if device.type == "cuda":
                    row["peak_mb"] = round(peak_mb(call, device), 1)
                rows.append(row)
                later.append((case, functions, operation))
                print(*row.values(), sep="  ", flush=True)
        given = call = None
    for row, (case, functions, operation) in (
        zip(rows, later, strict=True) if device.type != "cuda" else ()
    ):
        call = calls(functions, *inputs(*case, dtype, device), case[2])[operation]
        row["peak_mb"] = round(peak_mb(call, device), 1)
    return rows


def copy_speed(device):
    """GB a second, read and written, of a plain copy: of 1 GB on a GPU, of 256 MB on a CPU (beyond
    its caches).
    """
    source = torch.empty(
        2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device
    ).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), device)[0] / 1e6


def draw(rows, path):
    """One panel an operation: the time of every contender in every case, with its 20 and 80 %."""
    from common import plots

    names, operations = (list(dict.fromkeys(r[key] for r in rows)) for key in ("impl", "operation"))
    title = f"Time by batch x pixels/patch, ratio; {rows[0]['machine']}"
    size = (max(9, 3 + 0.25 * len(rows) / len(names)), 4)
    with plots.panels(path, title, 1, len(operations), size) as axes:
        for axis, operation in zip(axes, operations, strict=True):
            for name, colour in zip(names, plots.COLOURS, strict=False):
                own = [r for r in rows if (r["impl"], r["operation"]) == (name, operation)]
                ms, low, high = (
                    np.array([r[key] for r in own]) for key in ("ms", "ms_20", "ms_80")
                )
                cases = ["{batch} x {size}/{patch}, {ratio}".format(**r) for r in own]
                axis.errorbar(
                    cases, ms, [ms - low, high - ms], fmt="o", ms=6, label=name, color=colour
                )
            axis.tick_params("x", rotation=90, labelsize=7)
            axis.set(yscale="log", title=operation)
            axis.margins(x=0.2)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        axes[0].set_ylabel("milliseconds, 20 % to 80 %")
        shown = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(*shown, loc="outside lower center", ncols=len(names))


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda")
    add(
        "--batch",
        type=at_least(1),
        nargs="+",
        help="batch sizes, on a GPU (default: 256 1024 4096)",
    )
    add("--dtype", choices=DTYPES, help="of patches and predictions (default: bf16 on a GPU)")
    add(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder of the CSV and the plot (default: runs/bench)",
    )
    args = parser.parse_args()
    device = pick_device(args.device)
    if device.type != "cuda":
        refuse_idle(args.given & {"batch"}, "with a CPU, which has two cases of its own")
    if device.type == "cuda":
        grid = GPU_CASES | ({"batch": args.batch} if args.batch else {})
        cases, dtype, name = list(itertools.product(*grid.values())), "bf16", "bench_kernels.csv"
    else:
        cases, dtype, name = CPU_CASES, "fp32", "bench_kernels_cpu.csv"
        print("no GPU here: the CPU's paths are measured; the kernels and their bandwidth are not")
    path, dtype = args.out / name, DTYPES[args.dtype or dtype]
    claim([path, path.with_suffix(".png")])
    gate(device, dtype)
    copy_gb_s = copy_speed(device)
    where = {"copy_gb_per_s": round(copy_gb_s, 1)} | about(device, triton=TRITON)
    rows = [row | where for row in measure(cases, dtype, device, copy_gb_s)]
    save_csv(path, rows)
    draw(rows, path.with_suffix(".png"))
    print(f"wrote    {path} and .png; a copy moves {copy_gb_s:.0f} GB/s")


if __name__ == "__main__":
    cli(main)
