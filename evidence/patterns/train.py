"""Train the model of patterns: `python -m evidence.patterns.train`; the same command resumes a stopped run.

SIGTERM and Ctrl-C save the state after the current step. Every 200 steps, losses on held-out pictures go to
`losses.csv` in the folder.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from demo.autoencoder import PATCH, Autoencoder

from ..chance import HELD_OUT
from ..training.export import export, load_snapshot
from ..training.networks import Diffusion, Size, Stage, alphas, encode
from ..training.recipe import (
    Run,
    StopOnSignal,
    World,
    averaged,
    draw_noise,
    scale_of,
    stage_at,
    train_autoencoder,
    train_diffusion,
)
from ..training.words import make_tokenizer, tokens_of
from .attention import Attention, begin_with_similar, mean_attention
from .scenes import WORDS, caption, random_scene

FOLDER = Path.home() / ".cache" / "cove" / "training" / "patterns"
START = "start.safetensors"  # in the folder: the snapshot from which training started
TIMESTEPS = (100, 300, 500, 700)
HELD = 32  # held-out pictures for measuring the loss
EVERY = 200  # steps between measurements
WARM = 100  # warm-up steps of the optimizer after starting from a snapshot

# About twelve hours on one core of a Xeon with AMX. Small pictures come first: more of them fit into the same time.
SIZE = Size(
    autoencoder=96,
    unet=(64, 128, 128),
    heads=2,
    context=128,
    autoencoder_batch=32,
    autoencoder_steps=1000,
    stages=(
        Stage(64, batch=64, fresh=16, steps=4000, rate=8e-4, fall=0.3, focus=(200, 800)),
        Stage(128, batch=24, fresh=6, steps=1500, rate=6e-4, fall=0.1, focus=(200, 800)),  # patterns
        Stage(128, batch=24, fresh=6, steps=3500, rate=5.7e-4, fall=0.7, focus=(400, 1000)),  # shapes
        Stage(192, batch=12, fresh=4, steps=1500, rate=3e-4, fall=1.0, focus=(400, 1000)),
    ),
)


def example(number: int, size: int) -> tuple[Tensor, str]:
    scene = random_scene(Generator().manual_seed(number), size // PATCH, size // PATCH)
    return scene.draw(size), caption(scene)


WORLD = World(example, WORDS)


class Probe:
    """Losses on held-out pictures of one size."""

    def __init__(self, autoencoder: Autoencoder, scale: float, picture: int):
        numbers = range(HELD_OUT, HELD_OUT + HELD)
        examples = [WORLD.example(number, picture) for number in numbers]
        self.latents = encode(autoencoder, torch.stack([picture for picture, _ in examples])) * scale
        self.tokens = tokens_of(make_tokenizer(WORDS), [words for _, words in examples]).to(self.latents.device)

    @torch.no_grad()
    def loss(self, diffusion: Diffusion, timestep: int) -> float:
        """Return the mean squared error of the noise at one timestep, on the same noise for every model."""
        noise = draw_noise(self.latents.shape, Generator().manual_seed(timestep)).to(self.latents)
        left = alphas()[timestep]
        noisy = left.sqrt() * self.latents + (1 - left).sqrt() * noise
        timesteps = torch.full((len(noisy),), timestep, device=noisy.device)
        errors = []
        for part in torch.arange(len(noisy)).split(8):
            with torch.autocast(noisy.device.type, torch.bfloat16):
                found = diffusion(noisy[part], timesteps[part], self.tokens[part])
            errors.append((found.float() - noise[part]).square().flatten(1).mean(1))
        return torch.cat(errors).mean().item()

    def losses(self, diffusion: Diffusion) -> list[float]:
        """Return the loss at each of `TIMESTEPS`, then with the finest self-attention replaced by its mean."""
        plain = [self.loss(diffusion, timestep) for timestep in TIMESTEPS]
        with mean_attention(diffusion.unet):
            return plain + [self.loss(diffusion, timestep) for timestep in TIMESTEPS]


class Observer:
    """Observer that logs held-out losses every `EVERY` steps and stops the run on a signal."""

    def __init__(self, size: Size, log: Path):
        self.size, self.log, self.stop, self.cpu = size, log, StopOnSignal(), time.process_time()
        self.autoencoder: Autoencoder | None = None  # set once it is trained
        self.probes: dict[int, Probe] = {}  # by pixels per side; only the current stage's is kept

    def __call__(self, run: Run) -> None:
        if run.done % EVERY == 0:
            stage = self.size.stages[stage_at(self.size.stages, run.done - 1)[0]]
            if stage.picture not in self.probes:
                scale = scale_of(self.size, WORLD, self.autoencoder)
                self.probes = {stage.picture: Probe(self.autoencoder, scale, stage.picture)}
            losses = self.probes[stage.picture].losses(run.average.module)
            new = not self.log.is_file()
            with self.log.open("a", newline="") as file:
                rows = csv.writer(file)
                if new:
                    kinds = [f"{kind} {t}" for kind in ("loss", "mean") for t in TIMESTEPS]
                    rows.writerow(["step", "picture", "CPU seconds of this run", *kinds])
                seconds = round(time.process_time() - self.cpu)
                rows.writerow([run.done, stage.picture, seconds, *(f"{loss:.4f}" for loss in losses)])
        self.stop(run)


def begin_with(snapshot: Path, size: Size, run: Run) -> None:
    """Start a new run from a snapshot; the optimizer warms up again."""
    _, diffusion, begun = load_snapshot(snapshot, size, WORDS)
    if run.done == 0:
        run.model.load_state_dict(diffusion.state_dict())
        run.average.module.load_state_dict(diffusion.state_dict())
        run.average.n_averaged.fill_(begun)
        run.done = begun
    rate = run.rate
    run.rate = lambda step: rate(step) * min(1.0, (step - begun + 1) / WARM)


def train(size: Size, folder: Path, observer: Observer) -> tuple[Autoencoder, nn.Module, float]:
    """Train to the last step: autoencoder, averaged UNet and text encoder, and the scale of latents."""
    device, snapshot = torch.device("cuda" if torch.cuda.is_available() else "cpu"), folder / START
    if snapshot.is_file():
        autoencoder = load_snapshot(snapshot, size, WORDS)[0].to(device)
    else:
        small = replace(size, stages=size.stages[:1])  # the smallest pictures are enough for the autoencoder
        autoencoder = train_autoencoder(small, WORLD, folder, device, observer.stop)
    observer.autoencoder = autoencoder

    def prepare(run: Run) -> None:
        for diffusion in (run.model, run.average.module):
            diffusion.unet.set_attn_processor(Attention())
            if run.done == 0:
                begin_with_similar(diffusion.unet)
        if snapshot.is_file():
            begin_with(snapshot, size, run)

    return autoencoder, *train_diffusion(size, WORLD, autoencoder, folder, device, observer, prepare)


def write(path: Path, size: Size, autoencoder: Autoencoder, diffusion: nn.Module, steps: int) -> None:
    """Export the model to a file for Load Demo Model, from which training can also start."""
    pictures = WORLD.pictures(range(HELD_OUT, HELD_OUT + 64), size.stages[0].picture)
    scale = scale_of(size, WORLD, autoencoder)
    export(path, size, make_tokenizer(WORDS), autoencoder, diffusion, scale, pictures, steps)


def trained_so_far(size: Size, folder: Path) -> tuple[Autoencoder, nn.Module, int]:
    """Return autoencoder, averaged UNet with text encoder, and number of steps of the training in a folder."""
    if not (folder / "diffusion.pt").is_file():
        raise FileNotFoundError(f"{folder} holds no training: start one with python -m evidence.patterns.train")
    if (folder / START).is_file():
        autoencoder = load_snapshot(folder / START, size, WORDS)[0]
    else:
        autoencoder = Autoencoder(size.autoencoder)
        autoencoder.load_state_dict(averaged(folder / "autoencoder.pt")[0])
    diffusion = Diffusion(size, make_tokenizer(WORDS))
    weights, steps = averaged(folder / "diffusion.pt")
    diffusion.load_state_dict(weights)
    return autoencoder.eval().requires_grad_(False), diffusion.eval().requires_grad_(False), steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="state of the training (default: %(default)s)")
    parser.add_argument("--start", type=Path, help="exported file to start from, if the folder holds no training")
    parser.add_argument("--export", type=Path, help="export the current model to this file and exit")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if options.export:
        write(options.export, SIZE, *trained_so_far(SIZE, folder))
        return
    if options.start:
        begun = [path for path in (folder / "autoencoder.pt", folder / "diffusion.pt") if path.is_file()]
        if begun:
            parser.error(f"{folder} already holds a training; continue it without --start, or choose another --folder")
        shutil.copyfile(options.start, folder / START)
    train(SIZE, folder, Observer(SIZE, folder / "losses.csv"))
    command = f"python -m evidence.patterns.train --folder {folder} --export demo/patterns.safetensors"
    print(f"finished: write the model with {command}")


if __name__ == "__main__":
    main()
