"""How well tokens are matched, on clips whose motion is known: the paper's question of which feature to take.

    python benchmarks/matches.py [--clips 10] [--seeds 3]

The tokens of the first frame are followed through the clip; counted are the points of the things, and of everything,
that arrive within 1.5 tokens of where they truly are after one and after five frames. Beside the settings of Diffusion
Features stand what the model does not know of (patches of colours, optical flow) and ways to match better.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from einops import rearrange  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.model import load_demo  # noqa: E402
from cove.correspondence import Correspondence, find_correspondence  # noqa: E402
from cove.flow import dis_flow, flow_tracks  # noqa: E402
from cove.metrics import pck  # noqa: E402
from cove.tracks import tracks_of  # noqa: E402
from scripts.host import provide_host  # noqa: E402
from training.clips import MOTIONS, Clip, on_top, random_clip  # noqa: E402
from training.world import caption, pixels  # noqa: E402

FRAMES, SIDE, RADIUS, WINDOW = 6, 128, 1.5, 9
TIMESTEPS = (1, 21, 61, 121, 261, 401, 601)
DRAWS = 8


class Probe:
    """Hidden states of every decoder level of a clip, after noise of a timestep was added."""

    def __init__(self, model, clip, vae, nodes):
        import comfy.utils  # noqa: F401  # the host is in this process now

        self.model, self.text, self.vae, self.host = model, clip, vae, sys.modules["pack.nodes._host"]
        unet = self.host.unet_of(model, "benchmark")
        self.layers = []
        while True:
            try:
                self.layers.append(self.host.decoder_level_end(unet, len(self.layers), "benchmark"))
            except ValueError:
                break

    def states(self, clip: Clip, timestep: int, draws: int, shared: bool, seed: int) -> list[Tensor]:
        """Of each level, from the last on: [draws, frames, height, width, channels]."""
        pictures = clip.draw(SIDE)
        latent = {"samples": self.vae.encode(pictures)}
        conditioning = self.text.encode_from_tokens_scheduled(self.text.tokenize(caption(clip.scenes[0])))
        generator = torch.Generator().manual_seed(seed)
        found: list[list[Tensor]] = []

        def probe(denoise, x, sigmas, extra_args, callback, disable):
            for _ in range(draws):
                noise = torch.randn((1 if shared else len(x), *x.shape[1:]), generator=generator).to(x)
                with self.host.captured(self.layers[0]) as last, self._others() as others:
                    self.host.run_unet(denoise, x + sigmas[0] * noise, sigmas[0], extra_args["model_options"])
                found.append([state[0].float() for state in (last, *others)])
            return x

        sigmas = self.host.sigmas_at(self.model, [timestep])
        self.host.run(self.model, probe, latent, sigmas, conditioning, node="benchmark")
        side = latent["samples"].shape[-1]
        levels = [torch.stack(level) for level in zip(*found, strict=True)]
        return [
            rearrange(
                F.interpolate(level.flatten(0, 1), (side, side), mode="bilinear"), "(e f) c h w -> e f h w c", e=draws
            )
            for level in levels
        ]

    def _others(self):
        from contextlib import ExitStack, contextmanager

        @contextmanager
        def all_of():
            with ExitStack() as stack:
                yield [stack.enter_context(self.host.captured(layer)) for layer in self.layers[1:]]

        return all_of()


def unit(features: Tensor) -> Tensor:
    return F.normalize(features, dim=-1)


def patches(features: Tensor, side: int = 3) -> Tensor:
    """Each token with its neighbours: [frames, height, width, channels * side^2]."""
    padded = F.pad(features.movedim(-1, 1), [side // 2] * 4, mode="replicate")
    return rearrange(F.unfold(padded, side), "f c (h w) -> f h w c", h=features.shape[1])


def agreed(features: Tensor) -> Correspondence:
    """Among the five best matches the one whose own best match lies nearest to where it came from."""
    found = find_correspondence(features, WINDOW, 5)
    width = found.width

    def chosen(there: Tensor, back: Tensor) -> Tensor:
        best = []
        own = torch.arange(there.shape[1])[:, None]
        for matches, returns in zip(there.long(), back.long(), strict=True):
            home = returns[matches, 0]
            off = torch.hypot((home % width - own % width).float(), (home // width - own // width).float())
            order = off + 0.01 * torch.arange(5)  # of equals the more alike
            best.append(matches.gather(1, order.argmin(1, keepdim=True)))
        return torch.stack(best).int()

    return Correspondence(
        chosen(found.forward, found.backward), chosen(found.backward, found.forward), found.height, width, WINDOW
    )


def ways(probe: Probe, clip: Clip, seed: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name of a way to match -> the tracks it finds from the first frame, [frames, height, width, 2]."""
    pictures = clip.draw(SIDE)

    def tracked(features: Tensor) -> Tensor:
        return tracks_of(find_correspondence(unit(features), WINDOW, 1), 0)

    grid = SIDE // probe.vae.downscale_ratio
    small = F.adaptive_avg_pool2d(pictures.movedim(-1, 1), grid).movedim(1, -1)
    colours = patches(small)
    still = torch.zeros(FRAMES, grid, grid, 1) + 1.0
    yield "no motion", lambda: tracks_of(find_correspondence(still, 1, 1), 0)
    yield "RGB patches 3x3", lambda: tracked(colours - colours.mean((0, 1, 2)))
    yield "DIS flow", lambda: flow_tracks(*dis_flow(pictures), 0, grid, grid)
    for timestep in TIMESTEPS:
        for shared in (False, True):
            levels = probe.states(clip, timestep, DRAWS, shared, seed)
            noise = "shared" if shared else "independent"
            for draws in (1, DRAWS):
                means = [unit(level[:draws].mean(0)) for level in levels]
                for number, mean in enumerate(means):
                    yield f"level {number}, t {timestep}, {draws} {noise}", lambda mean=mean: tracked(mean)
                together = torch.cat(means, -1)
                yield f"all levels, t {timestep}, {draws} {noise}", lambda f=together: tracked(f)
                upper = torch.cat(means[1:], -1)
                yield (
                    f"all levels, agreed, t {timestep}, {draws} {noise}",
                    lambda f=together: tracks_of(agreed(unit(f)), 0),
                )
                yield f"all levels, neighbours, t {timestep}, {draws} {noise}", lambda f=together: tracked(patches(f))
                yield f"upper levels, neighbours, t {timestep}, {draws} {noise}", lambda f=upper: tracked(patches(f))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=10, help="clips a seed, of every motion in turn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "matches.json")
    arguments = parser.parse_args()

    probe = Probe(*load_demo(provide_host()))
    shares: dict[str, list[list[list[float]]]] = {}  # way -> seed -> clip -> things and all, after 1 and 5 frames
    with torch.inference_mode():
        for seed in range(arguments.seeds):
            generator = torch.Generator().manual_seed(1000 + seed)
            for number in range(arguments.clips):
                clip = random_clip(generator, FRAMES, MOTIONS[number % len(MOTIONS)])
                grid = SIDE // probe.vae.downscale_ratio
                true, visible = clip.tracks(0, grid)
                things = visible & (on_top(clip.scenes[0], pixels(grid)) >= 0)
                for name, find in ways(probe, clip, seed):
                    places = find()
                    row = [
                        pck(places, true, which, RADIUS)[after].item()
                        for which in (things, visible)
                        for after in (1, 5)
                    ]
                    shares.setdefault(name, [[] for _ in range(arguments.seeds)])[seed].append(row)
                print(f"seed {seed}: {number + 1} of {arguments.clips} clips", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(shares))
    columns = ("things, 1 frame", "things, 5 frames", "all, 1 frame", "all, 5 frames")
    print(f"{'':48}" + "".join(f"{column:>18}" for column in columns))
    for name, found in shares.items():
        means = torch.tensor(found).nanmean(1)  # of each seed
        print(f"{name:48}" + "".join(f"{m:11.3f} ±{s:5.3f}" for m, s in zip(means.mean(0), means.std(0), strict=True)))


if __name__ == "__main__":
    main()
