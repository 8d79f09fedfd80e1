"""Trains a demo model: `python -m training.train shapes`, and the same command again goes on where it was stopped.

Autoencoder first, on crops; then UNet and text encoder together, on its latents; then one file of half precision for
the Load Demo Model node. What it does follows from the seed and the step alone, so a broken run goes on as it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from cove.files import whole_file
from demo.autoencoder import LATENTS, Autoencoder

from .export import export
from .models import SIZES, STEPS, Diffusion, Size, alphas, encode
from .words import make_tokenizer, roughen, tokens_of
from .world import WORDS, Scene, caption, draw, random_scene

ROOT = Path(__file__).parent.parent
POOL = 4096  # latents at hand at one time
FRESH = 4  # of them replaced with new ones at each step
SAVE_EVERY = 300  # seconds
HELD_OUT = 10**9  # scenes from this number on are never trained on


@dataclass(frozen=True)
class World:
    """An endless row of scenes that follows from a seed, and every word that their captions may have."""

    random_scene: Callable[[Generator], Scene]
    words: tuple[str, ...]
    seed: int

    @classmethod
    def named(cls, name: str, seed: int) -> World:
        if name == "shapes":
            return cls(random_scene, WORDS, seed)
        from .emoji import Emoji  # here, as it needs Pillow

        emoji = Emoji(ROOT / ".training" / "emoji")
        return cls(emoji.random_scene, emoji.words, seed)

    def scene(self, number: int) -> Scene:
        return self.random_scene(Generator().manual_seed(self.seed * 2**32 + number))

    def pictures(self, numbers: Iterable[int], size: int) -> Tensor:
        return torch.stack([draw(self.scene(number), size) for number in numbers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--folder", type=Path, help="where unfinished work is kept (default: .training/<size>)")
    parser.add_argument("--output", type=Path, help="the finished file (default: demo/<size>.safetensors)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    size = SIZES[options.size]
    folder = options.folder or ROOT / ".training" / options.size
    output = options.output or ROOT / "demo" / f"{options.size}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    world = World.named(options.size, options.seed)
    autoencoder = train_autoencoder(size, world, folder, device)
    diffusion, scale = train_diffusion(size, world, autoencoder, folder, device)
    pictures = world.pictures(range(HELD_OUT, HELD_OUT + 64), size.picture).to(device)
    export(output, size, make_tokenizer(world.words), autoencoder, diffusion, scale, pictures)
    print(f"written: {output}")


@torch.no_grad()
def move_average(averages: list[Tensor], weights: list[Tensor], seen: Tensor) -> None:
    """Exponential average of 500 steps, of fewer at the beginning, so that the first weights are forgotten."""
    decay = min(0.998, (1 + int(seen)) / (10 + int(seen)))
    torch._foreach_lerp_(averages, weights, 1 - decay)


class Run:
    """One training: optimiser, learning rate, the average of the weights, and a file to go on from."""

    def __init__(
        self, make: Callable[[], nn.Module], path: Path, steps: int, rate: float, seed: int, device: torch.device
    ):
        with torch.random.fork_rng():  # torch's layers take their first weights from the process-wide generator
            torch.random.manual_seed(seed)
            self.model = make().to(device)
        self.path, self.steps, self.seed, self.device = path, steps, seed, device
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        warm = min(100, steps // 10)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, rate, total_steps=steps, pct_start=warm / steps, cycle_momentum=False, final_div_factor=100
        )
        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=move_average)
        self.done = 0
        if path.is_file():
            state = torch.load(path, map_location=device, weights_only=True)
            for name in ("model", "average", "optimiser", "schedule"):
                getattr(self, name).load_state_dict(state[name])
            self.done = state["done"]

    def save(self) -> None:
        names = ("model", "average", "optimiser", "schedule")
        with whole_file(self.path) as temporary:
            torch.save({name: getattr(self, name).state_dict() for name in names} | {"done": self.done}, temporary)

    def generators(self) -> Iterator[Generator]:
        """The chance of each step that is left to do."""
        for step in range(self.done, self.steps):
            yield Generator().manual_seed(self.seed * 2**32 + step)

    def train(self, loss_of: Callable[[Generator], Tensor]) -> nn.Module:
        """Go on to the last step; the averaged model."""
        self.model.train()
        started, saved, told, mean = time.monotonic(), time.monotonic(), self.done, None
        for generator in self.generators():
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = loss_of(generator)
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.schedule.step()
            self.average.update_parameters(self.model)
            self.done += 1
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            if self.done % 50 == 0:
                pace = (time.monotonic() - started) / (self.done - told)
                print(f"{self.path.stem}: step {self.done} of {self.steps}, loss {mean:.4f}, {pace:.2f} s", flush=True)
            if time.monotonic() - saved > SAVE_EVERY or self.done == self.steps:
                self.save()
                saved = time.monotonic()
        return self.average.module.eval().requires_grad_(False)


def train_autoencoder(size: Size, world: World, folder: Path, device: torch.device) -> Autoencoder:
    """Absolute error of the colours and of their differences between neighbours, so that edges stay sharp.

    Latents of a hundredth of noise decode to the same picture, and a little weight keeps them near one another: what a
    diffusion model leaves unfinished then does no harm.
    """
    run = Run(
        lambda: Autoencoder(size.autoencoder),
        folder / "autoencoder.pt",
        size.autoencoder_steps,
        1e-3,
        world.seed,
        device,
    )

    def loss_of(generator: Generator) -> Tensor:
        numbers = torch.randint(HELD_OUT, (size.batch,), generator=generator).tolist()
        pictures = world.pictures(numbers, size.picture).to(device) * 2 - 1
        latents = run.model.encode(pictures)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        again = run.model.decode(latents + 0.1 * noise).float()
        error = (again - pictures).abs().mean()
        for axis in (-1, -2):
            error = error + 0.5 * (again.diff(dim=axis) - pictures.diff(dim=axis)).abs().mean()
        return error + 1e-3 * latents.float().square().mean()

    return run.train(loss_of)


class Pool:
    """A window on the endless row of scenes, as latents and captions, that moves on at each step."""

    def __init__(self, size: Size, world: World, autoencoder: Autoencoder, start: int):
        self.size, self.world, self.autoencoder, self.next = size, world, autoencoder, start
        self.latents = torch.empty(POOL, LATENTS, size.latent, size.latent)
        self.captions = [""] * POOL
        while self.next < start + POOL:
            self.move(FRESH)  # always as many at a time: the autoencoder's last bits change with the batch

    def move(self, count: int) -> None:
        scenes = [self.world.scene(number) for number in range(self.next, self.next + count)]
        latents = encode(self.autoencoder, torch.stack([draw(s, self.size.picture) for s in scenes]))
        for offset, (one, latent) in enumerate(zip(scenes, latents, strict=True)):
            place = (self.next + offset) % POOL
            self.latents[place], self.captions[place] = latent, caption(one)
        self.next += count


def train_diffusion(
    size: Size, world: World, autoencoder: Autoencoder, folder: Path, device: torch.device
) -> tuple[nn.Module, float]:
    """Noise prediction, as Stable Diffusion's: the averaged model, and what latents are multiplied by."""
    tokenizer = make_tokenizer(world.words)
    run = Run(
        lambda: Diffusion(size, tokenizer), folder / "diffusion.pt", size.unet_steps, size.rate, world.seed, device
    )
    if run.done == run.steps:
        return run.train(None), json.loads((folder / "scale.json").read_text())
    pool = Pool(size, world, autoencoder, start=run.done * FRESH)
    if run.done == 0:
        (folder / "scale.json").write_text(json.dumps(1 / pool.latents.std().item()))
    scale = json.loads((folder / "scale.json").read_text())
    signal = alphas()

    def loss_of(generator: Generator) -> Tensor:
        pool.move(FRESH)
        chosen = torch.randint(POOL, (size.batch,), generator=generator)
        captions = [roughen(pool.captions[number], generator) for number in chosen.tolist()]
        noise = torch.randn(size.batch, *pool.latents.shape[1:], generator=generator)
        timesteps = torch.randint(STEPS, (size.batch,), generator=generator)
        left = signal[timesteps][:, None, None, None]
        noisy = left.sqrt() * pool.latents[chosen] * scale + (1 - left).sqrt() * noise
        found = run.model(noisy.to(device), timesteps.to(device), tokens_of(tokenizer, captions).to(device))
        return F.mse_loss(found.float(), noise.to(device))

    return run.train(loss_of), scale


if __name__ == "__main__":
    main()
