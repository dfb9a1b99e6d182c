"""Compiles every kernel for GPUs that are not here and prints what it needs of them, as JSON: one row a kernel.

    python tests/compile_kernels.py

test_kernels_triton.py runs it in a process of its own, since nothing compiles where
TRITON_INTERPRET is set.
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
from kernels import gather as G  # noqa: E402
from kernels import jit, tile, tl  # noqa: E402
from kernels import loss as L  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = (75, 80, 90, 120)  # T4; A100; H100 and H200; GeForce RTX 50
SHAPES = [
    (224, 16),
    (128, 16),
    (96, 8),
    (224, 14),
    (128, 32),
]  # S, p
DTYPES = ("bf16", "fp32", "fp16")  # all of them for the first shape


@jit
def greedy_kernel(x, out, WIDTH: tl.constexpr):
    """Not ours: holds far more numbers than a thread has registers. The test must see this one
    spill.
    """
    lanes = tl.arange(0, WIDTH)
    a = tl.load(x + lanes)
    rank = tl.cumsum(a, 0)
    for _ in range(8):
        a = a * rank + tl.sum(a, 0)
    tl.store(out + lanes, a + rank)


def compiled(kernel, types, constants, shape, target):
    """Compile as a launch with pointers that 16 divides would; types: {argument: Triton's name of
    its type}.
    """
    warps = shape.pop("num_warps")
    constants = {k: v for k, v in (constants | shape).items() if k in kernel.arg_names}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"]
    divisible = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps}
    )


def needs(binary):
    """-> what `cuobjdump` reads from the machine code: registers a thread, and bytes of stack (spills); and, from the
    PTX, how many bytes each load takes at once."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        told = subprocess.check_output(
            [TOOLS / "cuobjdump", "--dump-resource-usage", f.name], text=True
        )
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told))
    loads = re.findall(
        r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\s", binary.asm["ptx"]
    )  # ld.global.v4.b32: 16 bytes
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in loads]
    return {
        "registers": int(found["REG"]),
        "spills": int(found["STACK"]) + int(found["LOCAL"]),
        "loads": sorted(sizes),
    }


def kernels_of(S, p, dtype):
    """Name, kernel, types of its arguments, constants, the width of each kernel at this shape."""
    constants = dict(S=S, p=p, NORM_PIX=True, GRADIENT=True)
    types = dict(view="*u8", ids="*i64", count="i32", K="i32", M="i32", floor="fp32")
    types |= dict.fromkeys(("out", "pred", "gradient"), f"*{dtype}")
    types |= dict.fromkeys(("detail", "weight", "factor", "error"), "*fp32")
    ours = dict(gather=G.gather_kernel, detail=L.detail_kernel, loss=L.loss_kernel)
    for name, kernel in ours.items():
        if name != "detail" or dtype == DTYPES[0]:
            yield name, kernel, types, constants


def main():
    rows = []
    for target in TARGETS:
        for S, p in SHAPES:
            for dtype in DTYPES if (S, p) == SHAPES[0] else DTYPES[:1]:
                for name, kernel, types, constants in kernels_of(S, p, dtype):
                    found = needs(compiled(kernel, types, constants, tile(p * p * 3), target))
                    rows.append(dict(kernel=name, target=target, S=S, p=p, dtype=dtype) | found)
    greedy = compiled(
        greedy_kernel, dict(x="*fp32", out="*fp32"), {}, dict(WIDTH=8192, num_warps=1), 90
    )
    print(
        json.dumps(
            rows + [dict(kernel="greedy", target=90, S=0, p=0, dtype="fp32") | needs(greedy)]
        )
    )


if __name__ == "__main__":
    main()
