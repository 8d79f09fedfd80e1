"""Compile the Triton kernel of guided attention for NVIDIA GPUs and read the compiler's report; needs no GPU.

    python -m benchmarks.kernel_report

For every variant and architecture: registers of a thread, shared memory of a block, and bytes that did not fit into
registers (spilled). `evidence.tables.results` writes the tables, with what one call reads, gathers and computes.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from cove.merging import removed_tokens
from evidence.tables.records import FOLDER, Records

TARGETS = (75, 80, 86, 89, 90)  # compute capabilities: Turing, A100, RTX 3000, RTX 4000, H100
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


@dataclass(frozen=True)
class Variant:
    """What the kernel is compiled for."""

    heads: int = 8
    width: int = 40  # channels of a head
    frames: int = 32
    k: int = 3
    merge_ratio: float = 0.5
    dtype: str = "float16"

    @property
    def members(self) -> int:
        return (self.frames - 1) * self.k


VARIANTS = (
    *(Variant(frames=frames) for frames in (4, 8, 16, 32, 64)),
    Variant(merge_ratio=0.0),
    Variant(frames=64, k=5),
    *(Variant(heads, width) for heads, width in ((5, 64), (10, 64), (8, 80), (8, 160), (2, 32))),
    *(Variant(dtype=dtype) for dtype in ("float32", "bfloat16")),
)


def report(variant: Variant, target: int) -> dict[str, int]:
    """Compile for one compute capability; return registers, shared memory and spilled bytes of ptxas' report."""
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cove.kernels.attend import _attend, constants, warps

    members = variant.members
    known = constants(variant.heads, variant.width, members, removed_tokens(members, variant.merge_ratio))
    tokens = POINTERS[variant.dtype]
    signature = {"tokens": tokens, "inverse_norm": "*fp32", "sets": "*i32", "result": tokens}
    signature |= {"per_clip": "i32", "scale": "fp32"} | dict.fromkeys(known, "constexpr")
    source = ASTSource(fn=_attend, signature=signature, constexprs=known)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps(members)})
    assert made.asm["cubin"]
    ptxas = Path(triton.backends.nvidia.__file__).parent / "bin" / ("ptxas.exe" if os.name == "nt" else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(made.asm["ptx"])
        name = f"sm_{target}{'a' if target == 90 else ''}"
        command = [str(ptxas), "-v", f"--gpu-name={name}", str(path), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "shared": made.metadata.shared,
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
    }


# --- what a call costs at least ---


@dataclass(frozen=True)
class Gpu:
    """Published peaks: bytes of memory a second; FLOP/s of half precision, summed in float32, and of float32."""

    memory: float
    products: float
    single: float


GPUS = {
    "RTX 3090": Gpu(936e9, 71e12, 35.6e12),
    "RTX 4090": Gpu(1008e9, 165e12, 82.6e12),
    "H100": Gpu(3350e9, 989e12, 67e12),
}
TOKENS = 64 * 64  # a frame of 512x512 at the finest attention of SD1.5
CONDS = 2


@dataclass(frozen=True)
class Call:
    """One call of the kernel for prompt and negative prompt, counted."""

    memory: int  # bytes that are read or written at least once
    gathered: int  # bytes of the sets that come through the caches
    products: int  # FLOP of the similarities, padded as in the kernel
    single: int  # FLOP of logits and weighted sums

    @classmethod
    def of(cls, variant: Variant) -> Call:
        from cove.kernels.attend import constants

        members, channels = variant.members, variant.heads * variant.width
        element = 4 if variant.dtype == "float32" else 2
        removed = removed_tokens(members, variant.merge_ratio)
        known = constants(variant.heads, variant.width, members, removed)
        a, b = known["BLOCK_A"], known["BLOCK_B"]
        queries, passes = CONDS * variant.frames * TOKENS, 2
        similar = 0
        if removed:
            similar, passes = 2 * a * b * channels, 3
        return cls(
            memory=queries * (2 * channels * element + 4) + variant.frames * TOKENS * members * 4,
            gathered=queries * passes * members * channels * element,
            products=queries * similar,
            single=queries * 4 * (a + b) * channels,
        )

    def seconds(self, gpu: Gpu) -> float:
        """Return the time at the GPU's peaks if nothing overlaps."""
        return self.memory / gpu.memory + self.products / gpu.products + self.single / gpu.single


def spatial_temporal_seconds(variant: Variant, gpu: Gpu) -> float:
    """Return the time of the spatial-temporal attention before it, at the GPU's peak."""
    tokens = variant.frames * TOKENS
    return CONDS * 4 * tokens**2 * variant.heads * variant.width / gpu.products


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    records = Records(FOLDER / "kernel_report.jsonl")
    for variant in VARIANTS:
        for target in TARGETS:
            case = asdict(variant) | {"target": target}
            records.add(case, report(variant, target))
            print(case, records[case], flush=True)


if __name__ == "__main__":
    main()
