"""Check whether the GPU is usable: run workflow 0 in each precision and compare it with the CPU in float32.

    python -m benchmarks.offline.check [--only cpu bf16 ...]

Each precision runs in its own process, because ComfyUI chooses device and precision when it is imported. All run at the
same time, so timings are rough.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from scripts.host import PACK, provide_host
from scripts.in_process import run_prompt, start

EXACT = {"fp32_vae": True, "fp32_text_enc": True}
# ComfyUI's options by name in `comfy.cli_args.args`.
PRECISIONS = {
    "cpu": {"cpu": True},
    "fp32": EXACT | {"fp32_unet": True},
    "bf16": EXACT | {"bf16_unet": True},
    "fp16": EXACT | {"fp16_unet": True},
    "default": {},
}


def edit(precision: str) -> dict:
    """Run workflow 0; return the output tensors of its nodes by name, with seconds and peak memory in MiB."""
    if precision == "fp32":  # without TF32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pack = start(provide_host(), **PRECISIONS[precision])
    prompt = json.loads((PACK / "workflows" / "api" / "0_demo.json").read_text(encoding="utf-8"))
    gpu = precision != "cpu" and torch.cuda.is_available()
    began = time.perf_counter()
    with torch.inference_mode():
        found = run_prompt(prompt, pack, "VAEDecode")
    seconds = time.perf_counter() - began
    tensors = {}
    for name, outputs in found.items():
        for number, output in enumerate(outputs):
            value = output.get("samples") if isinstance(output, dict) else output
            if isinstance(value, Tensor):
                tensors[f"{name} [{number}]"] = value.detach().float().cpu()
    memory = torch.cuda.max_memory_allocated() / 2**20 if gpu else 0.0
    return {"tensors": tensors, "seconds": seconds, "MiB": memory}


def compare(name: str, found: dict, reference: dict) -> list[str]:
    lines = [f"{name}: {found['seconds']:.1f} s, {found['MiB']:.0f} MiB"]
    for key, expected in reference["tensors"].items():
        value = found["tensors"][key]
        error = (value - expected).norm() / expected.norm().clamp_min(1e-12)
        state = "" if value.isfinite().all() else "  NOT FINITE"
        lines.append(f"  {key:44} relative error {error:.1e}{state}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PRECISIONS, help="by default all, without a GPU only cpu")
    parser.add_argument("--one", nargs=2, metavar=("PRECISION", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.save(edit(arguments.one[0]), arguments.one[1])
        return
    gpu = torch.cuda.is_available()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(f"GPU: {torch.cuda.get_device_name()}" if gpu else "GPU: none that torch can use")
    names = arguments.only or [name for name in PRECISIONS if gpu or name == "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in names}
        command = [sys.executable, "-m", "benchmarks.offline.check", "--one"]
        running = {name: subprocess.Popen([*command, name, str(file)]) for name, file in files.items()}
        failed = [name for name, process in running.items() if process.wait()]
        found = {name: torch.load(file) for name, file in files.items() if name not in failed}
    for name in names:
        if name in found:
            print("\n".join(compare(name, found[name], found.get("cpu", found[name]))))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
