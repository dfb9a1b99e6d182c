"""Compile every kernel for GPUs that are not here; print what it needs of them as JSON, a row a kernel.

python tests/compile_kernels.py
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import gather, loss, tile  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = (75, 80, 90, 120)  # T4; A100; H100 and H200; GeForce RTX 50
SHAPES = [(224, 16), (128, 16), (96, 8), (224, 14), (128, 32)]  # S, p
DTYPES = ("bf16", "fp32", "fp16")  # all of them for the first shape
KERNELS = {"gather": gather.gather_kernel, "detail": loss.detail_kernel, "loss": loss.loss_kernel}
TYPES = {"view": "*u8", "ids": "*i64", "count": "i32", "K": "i32", "M": "i32", "floor": "fp32"}
TYPES |= dict.fromkeys(("detail", "weight", "factor", "error"), "*fp32")


def compiled(kernel, types, constants, target):
    """Compile as a launch with pointers that 16 divides would."""
    options = {"num_warps": constants.pop("num_warps")}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"]
    divisible = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def needs(binary):
    """-> registers and bytes of stack (spills) of a thread; bytes of each load, from the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", f.name]
        usage = subprocess.check_output(command, text=True)
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # such as ld.global.v4.b32: 16 bytes
    loads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\s", binary.asm["ptx"])
    sizes = sorted(int(count or 1) * int(bits) // 8 for count, bits in loads)
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"], "loads": sizes}


def rows_of(target, S, p):
    """A row for each kernel and dtype at this shape."""
    for dtype in DTYPES if (S, p) == SHAPES[0] else DTYPES[:1]:
        types = TYPES | dict.fromkeys(("out", "pred", "gradient"), f"*{dtype}")
        for name, kernel in KERNELS.items():
            if name == "detail" and dtype != DTYPES[0]:
                continue  # it has no dtype
            constants = {"S": S, "p": p, "NORM_PIX": True, "GRADIENT": True} | tile(p * p * 3)
            about = {"kernel": name, "target": target, "S": S, "p": p, "dtype": dtype}
            yield about | needs(compiled(kernel, types, constants, target))


def main():
    rows = []
    for target in TARGETS:
        for S, p in SHAPES:
            rows += rows_of(target, S, p)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
