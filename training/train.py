"""Trains a demo model: `python -m training.train shapes`, and the same command again goes on where it was stopped.

Autoencoder first, on crops; then UNet and text encoder together, on its latents; then one file of half precision for
the Load Demo Model node. What it does follows from the seed and the step alone, so a broken run goes on as it was.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from cove.files import whole_file
from demo.autoencoder import LATENTS, PATCH, Autoencoder

from .export import export
from .models import SIZES, STEPS, Diffusion, Size, Stage, alphas, encode
from .words import make_tokenizer, roughen, tokens_of
from .world import HELD_OUT, WORDS, Scene, caption, draw, random_scene

ROOT = Path(__file__).parent.parent
POOL = 4096  # latents at hand at one time
SCALED_BY = 256  # pictures whose latents the scale is measured on
SAVE_EVERY = 300  # seconds
SEED = 1  # of the first weights


@dataclass(frozen=True)
class World:
    """An endless row of scenes, and every word that their captions may have."""

    random_scene: Callable[[Generator], Scene]
    words: tuple[str, ...]

    @classmethod
    def named(cls, name: str) -> World:
        if name == "shapes":
            return cls(random_scene, WORDS)
        from .emoji import Emoji  # here, as it needs Pillow

        emoji = Emoji(ROOT / ".training" / "emoji")
        return cls(emoji.random_scene, emoji.words)

    def scene(self, number: int) -> Scene:
        return self.random_scene(Generator().manual_seed(number))

    def example(self, number: int, size: int) -> tuple[Tensor, str]:
        """Return a picture, [3, size, size], and its caption."""
        scene = self.scene(number)
        return draw(scene, size), caption(scene)

    def pictures(self, numbers: Iterable[int], size: int) -> Tensor:
        return torch.stack([self.example(number, size)[0] for number in numbers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--folder", type=Path, help="where unfinished work is kept (default: .training/<size>)")
    parser.add_argument("--output", type=Path, help="the finished file (default: demo/<size>.safetensors)")
    options = parser.parse_args()
    size = SIZES[options.size]
    folder = options.folder or ROOT / ".training" / options.size
    output = options.output or ROOT / "demo" / f"{options.size}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    world = World.named(options.size)
    autoencoder = train_autoencoder(size, world, folder, device)
    diffusion, scale = train_diffusion(size, world, autoencoder, folder, device)
    pictures = world.pictures(range(HELD_OUT, HELD_OUT + 64), size.picture).to(device)
    export(output, size, make_tokenizer(world.words), autoencoder, diffusion, scale, pictures)
    print(f"written: {output}")


WARM = 100  # steps in which a learning rate grows to its full size, or a tenth of all


def falling(rate: float, steps: int, step: int, fall: float = 1.0) -> float:
    """The learning rate of a step: it warms up, then goes through a share of a half cosine down to zero."""
    warm = min(WARM, steps // 10)
    if step < warm:
        return rate * (step + 1) / warm
    return rate * (1 + math.cos(math.pi * fall * (step - warm) / (steps - warm))) / 2


@torch.no_grad()
def move_average(averages: list[Tensor], weights: list[Tensor], seen: Tensor) -> None:
    """Exponential average of 500 steps, of fewer at the beginning, so that the first weights are forgotten."""
    decay = min(0.998, (1 + int(seen)) / (10 + int(seen)))
    torch._foreach_lerp_(averages, weights, 1 - decay)


STATE = ("model", "average", "optimiser")
Observer = Callable[["Run"], None]


def ignore(run: Run) -> None:
    pass


class Run:
    """One training: optimiser, learning rate, the average of the weights, and a file to go on from."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        path: Path,
        steps: int,
        rate: Callable[[int], float],  # step -> learning rate
        seed: int,
        device: torch.device,
    ):
        with torch.random.fork_rng():  # torch's layers take their first weights from the process-wide generator
            torch.random.manual_seed(seed)
            self.model = make().to(device)
        self.path, self.steps, self.rate, self.device = path, steps, rate, device
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=rate(0), betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=move_average)
        self.done = 0
        if path.is_file():
            state = torch.load(path, map_location=device, weights_only=True)
            for name in STATE:
                getattr(self, name).load_state_dict(state[name])
            self.done = state["done"]

    def save(self) -> None:
        with whole_file(self.path) as temporary:
            torch.save({name: getattr(self, name).state_dict() for name in STATE} | {"done": self.done}, temporary)

    def generators(self) -> Iterator[Generator]:
        """The chance of each step that is left to do."""
        for step in range(self.done, self.steps):
            yield Generator().manual_seed(step)

    def train(self, loss_of: Callable[[Generator], Tensor], observe: Observer = ignore) -> nn.Module:
        """Go on to the last step; the averaged model. `observe` is called with the run after every step."""
        self.model.train()
        started, saved, told, mean = time.monotonic(), time.monotonic(), self.done, None
        for generator in self.generators():
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = loss_of(generator)
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate(self.done)
            self.optimiser.step()
            self.average.update_parameters(self.model)
            self.done += 1
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            if self.done % 50 == 0:
                pace = (time.monotonic() - started) / (self.done - told)
                print(f"{self.path.stem}: step {self.done} of {self.steps}, loss {mean:.4f}, {pace:.2f} s", flush=True)
            if time.monotonic() - saved > SAVE_EVERY or self.done == self.steps:
                self.save()
                saved = time.monotonic()
            observe(self)
        return self.average.module.eval().requires_grad_(False)


def train_autoencoder(
    size: Size, world: World, folder: Path, device: torch.device, observe: Observer = ignore
) -> Autoencoder:
    """Absolute error of the colours and of their differences between neighbours, so that edges stay sharp.

    Latents of a hundredth of noise decode to the same picture, and a little weight keeps them near one another: what a
    diffusion model leaves unfinished then does no harm.
    """
    steps = size.autoencoder_steps
    run = Run(
        lambda: Autoencoder(size.autoencoder),
        folder / "autoencoder.pt",
        steps,
        partial(falling, 1e-3, steps),
        SEED,
        device,
    )

    def loss_of(generator: Generator) -> Tensor:
        numbers = torch.randint(HELD_OUT, (size.autoencoder_batch,), generator=generator).tolist()
        pictures = world.pictures(numbers, size.picture).to(device) * 2 - 1
        latents = run.model.encode(pictures)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        again = run.model.decode(latents + 0.1 * noise).float()
        error = (again - pictures).abs().mean()
        for axis in (-1, -2):
            error = error + 0.5 * (again.diff(dim=axis) - pictures.diff(dim=axis)).abs().mean()
        return error + 1e-3 * latents.float().square().mean()

    return run.train(loss_of, observe)


class Pool:
    """A window on the endless row of scenes, as latents and captions, that moves on at each step of a stage."""

    def __init__(self, stage: Stage, world: World, autoencoder: Autoencoder, start: int):
        self.stage, self.world, self.autoencoder, self.next = stage, world, autoencoder, start
        side = stage.picture // PATCH
        self.latents = torch.empty(POOL, LATENTS, side, side)
        self.captions = [""] * POOL
        while self.next < start + POOL:
            self.move()  # always as many at a time: the autoencoder's last bits change with the batch

    def move(self) -> None:
        numbers = range(self.next, self.next + self.stage.fresh)
        pictures, captions = zip(*(self.world.example(number, self.stage.picture) for number in numbers), strict=True)
        latents = encode(self.autoencoder, torch.stack(pictures))
        for number, latent, words in zip(numbers, latents, captions, strict=True):
            self.latents[number % POOL], self.captions[number % POOL] = latent, words
        self.next += self.stage.fresh


def stage_at(stages: Sequence[Stage], step: int) -> tuple[int, int]:
    """Number of the stage that a step of the whole training belongs to, and which of its steps it is."""
    for number, stage in enumerate(stages):
        if step < stage.steps:
            return number, step
        step -= stage.steps
    raise ValueError(f"step {step} lies after the last stage")


OFFSET = 0.1  # of the noise's mean, a picture and channel


def draw_noise(shape: Sequence[int], generator: Generator) -> Tensor:
    """Noise whose mean varies more than that of white noise.

    The mean of a picture stays visible through white noise up to the last timestep of Stable Diffusion's schedule; a
    model that reads it there learns no words for it, and at sampling, where it says nothing, paints any ground.
    """
    return torch.randn(shape, generator=generator) + OFFSET * torch.randn((*shape[:2], 1, 1), generator=generator)


def draw_timesteps(count: int, focus: tuple[int, int], generator: Generator) -> Tensor:
    """Half of them anywhere, half where the focus is."""
    anywhere = torch.randint(STEPS, (count,), generator=generator)
    there = torch.randint(*focus, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.5, anywhere, there)


def loss_weight(left: Tensor) -> Tensor:
    """Of the squared error of the noise, by the share of the signal's variance that is left.

    The signal-to-noise ratio, kept between 0.05 and 5, over itself: less for the least noise (Hang et al., 2023, ICCV,
    "min-SNR"), more for the most, where the error of the picture hardly shows in that of the noise.
    """
    ratio = left / (1 - left)
    return ratio.clamp(0.05, 5) / ratio


def train_diffusion(
    size: Size,
    world: World,
    autoencoder: Autoencoder,
    folder: Path,
    device: torch.device,
    observe: Observer = ignore,
    prepare: Callable[[Run], None] = ignore,
) -> tuple[nn.Module, float]:
    """Noise prediction, as Stable Diffusion's: the averaged model, and what latents are multiplied by.

    `prepare` is called with the run before its first step, `observe` after every step.
    """
    tokenizer, steps = make_tokenizer(world.words), sum(stage.steps for stage in size.stages)

    def rate(step: int) -> float:
        number, step = stage_at(size.stages, step)
        stage = size.stages[number]
        return falling(stage.rate, stage.steps, step, stage.fall)

    run = Run(lambda: Diffusion(size, tokenizer), folder / "diffusion.pt", steps, rate, SEED, device)
    prepare(run)
    scale = scale_of(size, world, autoencoder)
    signal, pool = alphas(), None

    def loss_of(generator: Generator) -> Tensor:
        nonlocal pool
        number, done = stage_at(size.stages, run.done)
        stage = size.stages[number]
        if pool is None or pool.stage is not stage:
            seen = sum(earlier.steps * earlier.fresh for earlier in size.stages[:number])
            pool = Pool(stage, world, autoencoder, seen + done * stage.fresh)
        pool.move()
        chosen = torch.randint(POOL, (stage.batch,), generator=generator)
        captions = [roughen(pool.captions[number], generator) for number in chosen.tolist()]
        noise = draw_noise((stage.batch, *pool.latents.shape[1:]), generator)
        timesteps = draw_timesteps(stage.batch, stage.focus, generator)
        left = signal[timesteps][:, None, None, None]
        noisy = left.sqrt() * pool.latents[chosen] * scale + (1 - left).sqrt() * noise
        found = run.model(noisy.to(device), timesteps.to(device), tokens_of(tokenizer, captions).to(device))
        return (loss_weight(left).to(device) * (found.float() - noise.to(device)).square()).mean()

    return run.train(loss_of, observe), scale


def scale_of(size: Size, world: World, autoencoder: Autoencoder) -> float:
    """What latents are multiplied by to have unit variance."""
    pictures = world.pictures(range(HELD_OUT, HELD_OUT + SCALED_BY), size.picture)
    return 1 / torch.cat([encode(autoencoder, some).cpu() for some in pictures.split(8)]).std().item()


if __name__ == "__main__":
    main()
