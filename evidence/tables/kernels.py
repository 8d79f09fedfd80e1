"""Tables of the Triton kernel: the compiler's report, and what one call costs at least."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.kernel_report import GPUS, TARGETS, VARIANTS, Call, Variant, spatial_temporal_seconds

from .markdown import rows
from .records import FOLDER, Records


def kernel_report() -> str:
    """Tabulate registers, shared memory and spilled bytes of every variant and target."""
    found = list(Records(FOLDER / "kernel_report.jsonl"))
    lines = []
    for variant in VARIANTS:
        merged = f"{variant.merge_ratio:.0%} merged" if variant.merge_ratio else "not merged"
        line = [f"{variant.heads}x{variant.width}", variant.dtype, f"{variant.members}, {merged}"]
        for target in TARGETS:
            wanted = asdict(variant) | {"target": target}
            one = next((measured for case, measured in found if case == wanted), None)
            if one is None:
                raise LookupError("kernel_report")
            line.append(f"{one['registers']} / {one['shared'] // 1024} / {one['spilled']}")
        lines.append(line)
    return rows(["heads", "dtype", "set", *(f"sm_{target}" for target in TARGETS)], lines)


def kernel_estimate() -> str:
    """Tabulate what one call moves and computes, and its time at the peaks of some GPUs."""
    lines = []
    for frames in (4, 8, 16, 32, 64):
        variant = Variant(frames=frames)
        call = Call.of(variant)
        line = [str(frames), f"{call.memory / 1e9:.2f} GB", f"{call.gathered / 1e9:.1f} GB"]
        line += [f"{call.products / 1e12:.2f} e12", f"{call.single / 1e12:.2f} e12"]
        for gpu in GPUS.values():
            seconds, before = call.seconds(gpu), spatial_temporal_seconds(variant, gpu)
            line.append(f"{1000 * seconds:.1f} ms ({100 * seconds / before:.1f} %)")
        lines.append(line)
    return rows(["frames", "memory", "gathered", "products", "float32", *GPUS], lines)
