"""Make the pictures of docs/how-it-works.md with the nodes, the demo model and the demo clip.

python -m evidence.tables.pictures
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from cove.draw import contact_sheet, draw_matches, draw_tracks
from cove.schedule import Schedule
from scripts.host import PACK
from scripts.in_process import call

from ..shapes.clips import demo_clip
from ..shapes.scenes import caption
from .demo import load_demo

FOLDER = PACK / "docs" / "how-it-works"
SIDE, SHOWN, FRAME = 128, 256, 3  # pixels per side of the clip and of a drawn frame; frame of the points
POINT = (122.0, 116.0)  # on an edge of the star in that frame, in pixels of a drawn frame


def main() -> None:
    model, clip, vae, nodes = load_demo()
    source = demo_clip()
    images = source.draw(SIDE)
    with torch.inference_mode():
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize(caption(source.scenes[0])))
        latent = {"samples": vae.encode(images)}
        features, picture = call(nodes["DiffusionFeatures"], model=model, latent=latent, conditioning=prompt)
        (matches,) = call(nodes["Correspondence"], features=features)
    large, shown = _resized(images), [0, 2, 5, 7]
    FOLDER.mkdir(parents=True, exist_ok=True)
    _save(
        "features.png", torch.cat([contact_sheet(large[shown], 4), contact_sheet(_resized(picture)[shown], 4)], dim=1)
    )
    _save("matches.png", contact_sheet(draw_tracks(large, matches, [POINT], FRAME), 4))
    _save("attention.png", contact_sheet(draw_matches(large, matches, [POINT], FRAME), 4))
    _plot_schedule(Schedule(10, 2), 0.8).savefig(FOLDER / "schedule.png", dpi=100)


def _resized(images: Tensor) -> Tensor:
    resized = torch.nn.functional.interpolate(images.movedim(-1, 1), (SHOWN, SHOWN), mode="nearest")
    return resized.movedim(1, -1)


def _save(name: str, sheet: Tensor) -> None:
    pixels = (sheet[0].clamp(0, 1) * 255).round().byte().numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(FOLDER / name, optimize=True)
    print(FOLDER / name)


def _plot_schedule(schedule: Schedule, share: float) -> Figure:
    """Plot the timesteps of inversion and sampling, and the steps in which features are injected."""
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.subplots()
    first = schedule.sampling[-schedule.share(share)]
    axes.axvspan(first - 20, schedule.sampling[-1] + 20, color="tab:orange", alpha=0.15, label="features are injected")
    for height, timesteps, colour, name in (
        (1, schedule.inversion, "tab:blue", f"inversion, multiple {schedule.multiple} (left to right)"),
        (0, schedule.sampling, "tab:red", "sampling (right to left)"),
    ):
        axes.plot([0, timesteps[-1]], [height, height], color=colour, linewidth=1)
        axes.plot(timesteps, [height] * len(timesteps), "o", color=colour, label=name)
    for timestep in schedule.sampling:
        axes.plot([timestep, timestep], [0, 1], color="grey", linewidth=0.5)
    axes.set(yticks=[], ylim=(-0.5, 1.5), xlim=(-30, 1030), xlabel="timestep: clip at the left, noise at the right")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
