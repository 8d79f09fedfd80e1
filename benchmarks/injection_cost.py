"""Measure time, working memory and storage of Feature Injection, for each storage of the source's features.

    python -m benchmarks.injection_cost

A UNet of SD1.5's shape with random weights inverts random latents and samples them, in a real ComfyUI, with
Correspondence Attention, prompt and negative prompt. Each storage runs in its own process, and their results are
compared. The working memory with `disk` includes file pages that the system can drop at any time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NONE = "no injection"
VARIANTS = (NONE, "recompute", "memory", "disk")
STEPS = 3  # of inversion and of sampling; features are injected in all


def run(variant: str, frames: int, width: int, height: int, latents: Path) -> None:
    """Print seconds per step of inversion and of sampling, working memory of sampling, and bytes stored per step."""
    from scripts.host import provide_host

    host = provide_host()
    import torch

    from benchmarks.memory import working_memory
    from benchmarks.random_model import load
    from cove.correspondence import find_correspondence
    from scripts.in_process import call

    model, nodes, _ = load(host)
    generator = torch.Generator().manual_seed(1)
    size = (height // 8, width // 8)
    matches = find_correspondence(torch.randn(frames, *size, 32, generator=generator))
    latent = {"samples": torch.randn(frames, 4, *size, generator=generator)}
    source, edit = ([[torch.randn(1, 77, 768, generator=generator), {}]] for _ in range(2))
    (model,) = call(nodes["CorrespondenceAttention"], model=model, correspondence=matches)
    with torch.inference_mode():
        start = time.perf_counter()
        noise, inversion = nodes["DDIMInversion"].execute(model, source, latent, STEPS, 1, 1).args
        if variant not in (NONE, "recompute"):
            (inversion,) = nodes["StoreFeatures"].execute(model, inversion, 1.0, variant).args
        inverting = (time.perf_counter() - start) / STEPS
        if variant != NONE:
            model = nodes["FeatureInjection"].execute(model, inversion, 1.0, 1.0, "auto", "auto").args[0]
        found = []

        def sample() -> None:
            found.append(nodes["DDIMSampler"].execute(model, edit, source, noise, 7.5).args[0]["samples"])

        start = time.perf_counter()
        memory = working_memory(sample)
        sampling = (time.perf_counter() - start) / STEPS
    torch.save(found[0], latents)
    stored = sum(
        tensor.numel() * tensor.element_size() for kept in inversion.features.values() for tensor in kept.values()
    )
    print(inverting, sampling, memory, stored // STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--size", default="256x160", help="width x height in pixels")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--latents", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        run(arguments.variant, arguments.frames, *map(int, arguments.size.split("x")), arguments.latents)
        return

    import torch

    from evidence.tables.records import FOLDER, Records, machine

    records = Records(FOLDER / "injection_cost.jsonl")
    print(f"{machine()}, float32, {arguments.frames} frames of {arguments.size}, {STEPS} steps, 1 refinement")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.injection_cost",
                f"--frames={arguments.frames}",
                f"--size={arguments.size}",
            ]
            command += [f"--variant={variant}", f"--latents={Path(folder, variant)}"]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[variant] = tuple(map(float, answer.splitlines()[-1].split()))
        latents = {variant: torch.load(Path(folder, variant)) for variant in VARIANTS}
    for variant in VARIANTS[2:]:
        torch.testing.assert_close(latents[variant], latents["recompute"], rtol=1e-4, atol=1e-4)
    changed = (latents[NONE] - latents["recompute"]).norm() / latents[NONE].norm()
    assert changed > 0
    print(f"injection changes the latents by {100 * changed:.2g} %")
    print(f"{'':14}{'inversion, storing':>18}{'sampling step':>16}{'':9}{'working memory':>16}{'stored a step':>16}")
    for variant, (inverting, sampling, memory, stored) in found.items():
        case = {"frames": arguments.frames, "size": arguments.size, "storage": variant}
        measured = {"inversion": inverting, "sampling": sampling, "MiB": memory / 2**20, "stored": stored / 2**20}
        records.add(case, measured)
        print(
            f"{variant:14}{inverting:16.1f} s{sampling:14.1f} s{100 * (sampling / found[NONE][1] - 1):+7.0f} %"
            f"{memory / 2**20:13.0f} MiB{stored / 2**20:12.1f} MiB"
        )


if __name__ == "__main__":
    main()
