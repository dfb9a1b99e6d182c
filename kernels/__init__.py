"""The two kernels, and the choice between their implementations.

Each operation exists twice: a few lines of PyTorch, which say what is meant and run anywhere, and a
Triton kernel, which moves each byte once and runs on a GPU. TRITON_INTERPRET=1, set before Python
starts, runs the kernels in Triton's interpreter on the CPU: far too slow to train with, but a way
to step through one, or to test it.
"""

import contextlib
import os
import types

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except (
    ImportError
):  # there is no Triton for macOS: a kernel is then a plain function that nobody calls
    triton, tl, jit = None, types.SimpleNamespace(constexpr=None), lambda function: function

INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
TILE = (
    2**16 if INTERPRET else 2**11
)  # numbers that a program holds; the interpreter's cost is per program

default = "auto"  # what "auto" means in this process; a stage's --impl sets it


def choose_impl(impl, device):
    """impl "auto", "torch" or "triton" -> ("torch" or "triton", the reason in words).

    An implementation that can't run on this device is a ValueError: a fallback that nobody notices
    helps nobody.
    """
    device, wanted = torch.device(device), default if impl == "auto" else impl
    if wanted not in ("auto", "torch", "triton"):
        raise ValueError(f"--impl {wanted} is unknown; choose from auto, torch, triton")
    if wanted == "torch":
        return "torch", "as --impl says"
    problem = why_not_triton(device)
    if wanted == "triton" and problem:
        raise ValueError(f"--impl triton: {problem}; use --impl torch")
    if wanted == "triton":
        return "triton", "as --impl says" + (
            ", in Triton's interpreter" if device.type == "cpu" else ""
        )
    if device.type == "cuda" and not problem:
        return "triton", "the fused kernels serve a GPU"
    return "torch", f"the PyTorch reference serves {device.type}" + (
        f": {problem}" if device.type == "cuda" else ""
    )


def why_not_triton(device):
    """The reason why the kernels can't run on this device, or None."""
    if triton is None:
        return "Triton is not installed (pip install triton; there is none for macOS)"
    if device.type == "cpu" and not INTERPRET:
        return "Triton needs a GPU (on a CPU, TRITON_INTERPRET=1 runs its interpreter, for tests)"
    if device.type not in ("cpu", "cuda"):
        return f"Triton does not run on {device.type}"
    if (
        device.type == "cuda"
        and torch.version.cuda
        and torch.cuda.get_device_capability(device) < (7, 5)
    ):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 7.5, the least that is tested"
    return None


def tile(P):
    """How patches of P numbers are shared out: PATCHES a program, WIDTH (the next power of 2) lanes
    each, num_warps.

    16 numbers a thread: as bytes they fill one 16-byte load. 2048 a program of 4 warps, unless one
    patch is more.
    """
    width = 1 << (P - 1).bit_length()
    patches = max(1, TILE // width)
    return dict(PATCHES=patches, WIDTH=width, num_warps=min(32, max(4, patches * width // 512)))


def launch(kernel, count, size, *args, **constants):
    """Run the kernel over `count` patches of `size` numbers; args begin with a tensor, on whose
    device it runs.
    """
    device, shape = args[0].device, tile(size)
    if count == 0:
        return
    with (
        torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    ):  # Triton asks torch where
        kernel[(-(-count // shape["PATCHES"]),)](*args, **constants, **shape)
