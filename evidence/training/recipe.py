"""Resumable training: the autoencoder on pictures, then UNet and text encoder on its latents.

Every step depends only on the seed and the step number, so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from cove.files import atomic_write
from demo.autoencoder import LATENTS, PATCH, Autoencoder

from ..chance import HELD_OUT
from .networks import STEPS, Diffusion, Size, Stage, alphas, encode
from .words import make_tokenizer, roughen, tokens_of

POOL = 4096  # latents kept in memory
SCALED_BY = 256  # pictures for measuring the scale of latents
SAVE_EVERY = 300  # seconds
SEED = 1  # of the initial weights


@dataclass(frozen=True)
class World:
    """An endless sequence of numbered pictures, and every word of their captions."""

    example: Callable[[int, int], tuple[Tensor, str]]  # number and pixels per side -> picture [3, side, side], caption
    words: tuple[str, ...]

    def pictures(self, numbers: Iterable[int], size: int) -> Tensor:
        return torch.stack([self.example(number, size)[0] for number in numbers])


WARM = 100  # steps of learning rate warm-up, a tenth of all steps at most


def falling(rate: float, steps: int, step: int, fall: float = 1.0) -> float:
    """Return the learning rate of a step: warm-up, then the share `fall` of a half cosine from `rate` to zero."""
    warm = min(WARM, steps // 10)
    if step < warm:
        return rate * (step + 1) / warm
    return rate * (1 + math.cos(math.pi * fall * (step - warm) / (steps - warm))) / 2


@torch.no_grad()
def move_average(averages: list[Tensor], weights: list[Tensor], seen: Tensor) -> None:
    """Update an exponential moving average over 500 steps; over fewer at the start, to forget the initial weights."""
    decay = min(0.998, (1 + int(seen)) / (10 + int(seen)))
    torch._foreach_lerp_(averages, weights, 1 - decay)


STATE = ("model", "average", "optimiser")
Observer = Callable[["Run"], None]


def ignore(run: Run) -> None:
    pass


class StopOnSignal:
    """Observer that saves a run and exits after the step in which SIGTERM or Ctrl-C arrived."""

    def __init__(self):
        self.stopped = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_) -> None:
        self.stopped = True

    def __call__(self, run: Run) -> None:
        if self.stopped:
            run.save()
            raise SystemExit(f"{run.path} saved after step {run.done}")


class Run:
    """Training run: model, optimizer, learning rate, averaged weights, and the file to resume from."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        path: Path,
        steps: int,
        rate: Callable[[int], float],  # step -> learning rate
        seed: int,
        device: torch.device,
    ):
        with torch.random.fork_rng():  # torch's layers draw initial weights from the global generator
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
        with atomic_write(self.path) as temporary:
            torch.save({name: getattr(self, name).state_dict() for name in STATE} | {"done": self.done}, temporary)

    def generators(self) -> Iterator[Generator]:
        """Yield the generator of each remaining step."""
        for step in range(self.done, self.steps):
            yield Generator().manual_seed(step)

    def train(self, loss_of: Callable[[Generator], Tensor], observe: Observer = ignore) -> nn.Module:
        """Train to the last step and return the averaged model; call `observe` with the run after every step."""
        self.model.train()
        started, saved, first, mean = time.monotonic(), time.monotonic(), self.done, None
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
                pace = (time.monotonic() - started) / (self.done - first)
                print(f"{self.path.stem}: step {self.done} of {self.steps}, loss {mean:.4f}, {pace:.2f} s", flush=True)
            if time.monotonic() - saved > SAVE_EVERY or self.done == self.steps:
                self.save()
                saved = time.monotonic()
            observe(self)
        return self.average.module.eval().requires_grad_(False)


def train_autoencoder(
    size: Size, world: World, folder: Path, device: torch.device, observe: Observer = ignore
) -> Autoencoder:
    """Train the autoencoder on the absolute error of colours and of differences between neighbouring pixels.

    The differences keep edges sharp. Noise with a variance of 0.01 is added to latents before decoding, and a small
    penalty keeps latents close to zero, so that small errors of a diffusion model stay invisible.
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
    """Sliding window over the numbered pictures of a world, as latents and captions; advances at every step."""

    def __init__(self, stage: Stage, world: World, autoencoder: Autoencoder, start: int):
        self.stage, self.world, self.autoencoder, self.next = stage, world, autoencoder, start
        side = stage.picture // PATCH
        self.latents = torch.empty(POOL, LATENTS, side, side)
        self.captions = [""] * POOL
        while self.next < start + POOL:
            self.move()  # in batches of a fixed size: the last bits of latents depend on the batch size

    def move(self) -> None:
        numbers = range(self.next, self.next + self.stage.fresh)
        pictures, captions = zip(*(self.world.example(number, self.stage.picture) for number in numbers), strict=True)
        latents = encode(self.autoencoder, torch.stack(pictures))
        for number, latent, words in zip(numbers, latents, captions, strict=True):
            self.latents[number % POOL], self.captions[number % POOL] = latent, words
        self.next += self.stage.fresh


def stage_at(stages: Sequence[Stage], step: int) -> tuple[int, int]:
    """Return the index of the stage of a training step, and the step within that stage."""
    for number, stage in enumerate(stages):
        if step < stage.steps:
            return number, step
        step -= stage.steps
    raise ValueError(f"step {step} lies after the last stage")


OFFSET = 0.1  # standard deviation of the noise's mean per picture and channel


def draw_noise(shape: Sequence[int], generator: Generator) -> Tensor:
    """Draw noise whose mean varies more than that of white noise.

    The mean of a picture stays visible through white noise up to the last timestep of Stable Diffusion's schedule. A
    model that relies on it does not learn the words of the ground, and samples a random ground from pure noise.
    """
    return torch.randn(shape, generator=generator) + OFFSET * torch.randn((*shape[:2], 1, 1), generator=generator)


def draw_timesteps(count: int, focus: tuple[int, int], generator: Generator) -> Tensor:
    """Draw timesteps, half of them from the whole range, half from `focus`."""
    anywhere = torch.randint(STEPS, (count,), generator=generator)
    there = torch.randint(*focus, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.5, anywhere, there)


def loss_weight(left: Tensor) -> Tensor:
    """Return the weight of the squared error of the noise, from the signal's share of variance `left`.

    The weight is the signal-to-noise ratio, clamped to 0.05 to 5, divided by the unclamped ratio: below 1 at low noise
    (Hang et al., 2023, ICCV, "min-SNR"), above 1 at high noise, where the error of the noise hardly depends on the
    error of the picture.
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
    """Train UNet and text encoder to predict the noise, like Stable Diffusion.

    Calls `prepare` with the run before its first step and `observe` after every step.

    Returns:
        The averaged model, and the scale of latents.
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
    """Return the factor that gives latents unit variance."""
    pictures = world.pictures(range(HELD_OUT, HELD_OUT + SCALED_BY), size.picture)
    return 1 / torch.cat([encode(autoencoder, some).cpu() for some in pictures.split(8)]).std().item()


def averaged(path: Path) -> tuple[dict[str, Tensor], int]:
    """Return the averaged weights and the number of steps of a saved run."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "module."
    weights = {name.removeprefix(prefix): x for name, x in state["average"].items() if name.startswith(prefix)}
    return weights, state["done"]
