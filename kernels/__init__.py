"""The two kernels, and the choice between their implementations."""

import torch

default = "auto"  # what "auto" means in this process; a stage's --impl sets it


def choose_impl(impl, device):
    """impl "auto", "torch" or "triton" -> ("torch" or "triton", the reason in words).

    An implementation that can't run on this device is a ValueError: a fallback that nobody notices helps nobody.
    """
    kind = torch.device(device).type
    impl = default if impl == "auto" else impl
    if impl == "triton":
        raise ValueError("--impl triton: the Triton kernels are not written yet; use --impl torch")
    return "torch", "asked for" if impl == "torch" else f"the PyTorch reference serves {kind}"
