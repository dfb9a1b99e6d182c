"""The choice between the two implementations of each operation.

The reference is plain PyTorch and runs anywhere. The Triton kernel runs on a GPU, and writes no
intermediate result to memory. With TRITON_INTERPRET=1, the interpreter of Triton runs the kernels on a
CPU, for tests.
"""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl

    constexpr, jit = tl.constexpr, triton.jit
except ImportError:  # on macOS: a kernel is then a plain function that nobody calls
    triton = tl = constexpr = None

    def jit(function):
        return function


INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
TILE = 2**16 if INTERPRET else 2**11  # pixels per program; the interpreter is slow per program
# Triton compiles its link to the driver with these before its first kernel. A Linux distribution may
# have Python without its headers.
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
HEADER = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
HAS_HEADER = HEADER.exists()  # asked once, because torch.compile can't trace a look at the disk
OLDEST = (7, 0)  # compute capability; torch.compile refuses older GPUs, too
LARGEST = 104  # px of a patch: from 105 on, a sum of squared bytes overflows int32

IMPL = "auto"  # "torch": a GPU runs the references, too, so that what you change there trains


def choose_impl(impl, device):
    """impl "auto", "torch" or "triton" -> "torch" or "triton"; a ValueError if it can't run here."""
    device = torch.device(device)
    impl = IMPL if impl == "auto" else impl
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl {impl} is unknown; choose from auto, torch, triton")
    problem = why_not_triton(device)
    # Who asks for the kernel by name gets it or an error. If the reference ran in its place, a test
    # or a benchmark of the kernel would pass without it.
    if impl == "triton" and problem:
        raise ValueError(f"impl triton: {problem}; choose torch")
    if impl == "auto":
        return "triton" if device.type == "cuda" and not problem else "torch"
    return impl


def why_not_triton(device):
    """The reason why the kernels can't run on this device, or None."""
    if triton is None:
        return "Triton is not installed (pip install triton, on Windows triton-windows; macOS has none)"
    if device.type == "cpu":
        note = "on a CPU, TRITON_INTERPRET=1 runs its interpreter, for tests"
        return None if INTERPRET else f"Triton needs a GPU ({note})"
    if device.type != "cuda":
        return f"Triton does not run on {device.type}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST:
        return f"Triton needs a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or more"
    if os.name == "nt":  # triton-windows looks for a compiler by itself
        return None
    if not COMPILER:
        return "Triton needs a C compiler (install gcc)"
    return None if HAS_HEADER else f"Triton needs {HEADER} (apt install python3-dev)"


def tile(p):
    """How patches of p x p pixels are shared out: PATCHES a program, each in STRIPS of w pixels.

    A strip is a row of a patch, or 16 px of it. Its 3w numbers are three pieces of w, which take
    WIDTH lanes. A thread has a piece or so: as 16 bytes, one load.
    """
    # Triton's blocks have powers of 2 as sizes, and 3w is none: flat patches of 768 numbers would
    # take 1,024 lanes, a quarter of them idle, and the colour of a lane's number would have to be
    # computed. In three blocks of pieces it is constant: that of number i of piece c is (c w + i) % 3.
    w = 16 if p % 16 == 0 else p
    strips, width = triton.next_power_of_2(p * p // w), triton.next_power_of_2(w)
    patches = max(1, TILE // (strips * width))
    warps = min(32, max(4, patches * strips * width // 512))
    return dict(w=w, PATCHES=patches, STRIPS=strips, WIDTH=width, num_warps=warps)


def launch(kernel, ids, p, *args, **constants):
    """Run a kernel over all patches ids (B, K) of p x p pixels."""
    # CUDA refuses a grid of no programs.
    if ids.numel() == 0:
        return
    shape = tile(p)
    programs = triton.cdiv(ids.numel(), shape["PATCHES"])
    # Triton launches on the current GPU, which need not be the one that holds the tensors.
    with torch.cuda.device_of(ids):  # without effect on a CPU
        kernel[(programs,)](*args, p=p, **constants, **shape)
