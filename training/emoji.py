"""Emoji of several artists as things of the world: one concept in several art styles, and some that move.

`Emoji(folder)` fetches what is missing with `npm`, which knows its registry, and holds each package against its
checksum. Art: Google's Noto Emoji (Apache-2.0), Twitter's Twemoji (CC-BY 4.0), Microsoft's Fluent Emoji (MIT).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import Generator, Tensor

from .world import GROUND_WORDS, Placed, Scene, between, pick, random_ground

# Package -> SHA-256 of its file.
PACKAGES = {
    "emoji-datasource-google@16.0.0": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-datasource-twitter@16.0.0": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "@lobehub/fluent-emoji-anim-1@1.0.0": "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
}
# Style -> package and folder of its pictures.
STYLES = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets"),
}
MOVING = ("@lobehub/fluent-emoji-anim-1@1.0.0", "package/assets")
NAMES = ("emoji-datasource-google@16.0.0", "package/emoji.json")
# Things that one would put on a ground; no flags, signs or people, which come in many skins.
CATEGORIES = ("Animals & Nature", "Food & Drink", "Activities", "Travel & Places", "Objects")
SIDE = 128  # pixels of a stored picture


@dataclass(frozen=True, eq=False)
class Sticker(Placed):
    """A picture with transparency, on a square that ends at +-1 in its own coordinates."""

    concept: str
    style: str
    x: float
    y: float
    radius: float
    angle: float
    picture: Tensor = field(repr=False)  # [4, side, side] from 0 to 1, colours multiplied by the transparency

    def _at(self, points: Tensor) -> Tensor:
        """The picture's four values at points of the scene, [..., 4]."""
        inside = self.inside(points).flatten(0, -2)[None, None]
        found = F.grid_sample(self.picture[None], inside, align_corners=False)
        return found[0, :, 0].T.unflatten(0, points.shape[:-1])

    def covers(self, points: Tensor) -> Tensor:
        """Whether points of the picture, [..., 2], lie on it."""
        return self._at(points)[..., 3] > 0.5

    def look(self, points: Tensor, pixel: float) -> tuple[Tensor, Tensor]:
        """Its colours [..., 3] and how much of what lies behind they hide [..., 1], at points of the scene."""
        values = self._at(points)
        return values[..., :3] / values[..., 3:].clamp(min=1e-6), values[..., 3:]

    @property
    def words(self) -> str:
        return f"a {self.style} {self.concept}"


class Emoji:
    """The packages in a folder: concepts that every style has, as scenes."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def pictures(self) -> dict[str, dict[str, Tensor]]:
        """Concept -> style -> picture, [4, SIDE, SIDE]; the concepts that all styles have, in the order of Unicode."""
        (listed,) = self._read(NAMES[0], lambda name: name == NAMES[1]).values()
        concepts = {
            _code(entry["unified"]): _words(entry["name"])
            for entry in sorted(json.loads(listed), key=lambda entry: entry["sort_order"])
            if entry["category"] in CATEGORIES
        }
        drawn = {}
        for style, (package, inner) in STYLES.items():
            files = self._read(package, lambda name, inner=inner: name.startswith(f"{inner}/"))
            drawn[style] = {_code(Path(name).stem): content for name, content in files.items()}
        found: dict[str, dict[str, Tensor]] = {}
        for code, concept in concepts.items():
            if concept not in found and all(code in pictures for pictures in drawn.values()):
                found[concept] = {style: _picture(pictures[code]) for style, pictures in drawn.items()}
        return found

    @property
    def words(self) -> tuple[str, ...]:
        """Every word that a caption may have."""
        named = {word for concept in self.pictures for word in concept.split()}
        return (*GROUND_WORDS, *STYLES, *sorted(named - set(GROUND_WORDS) - set(STYLES)))

    def random_scene(self, generator: Generator) -> Scene:
        """One emoji on a ground."""
        concept = pick(self.pictures, generator)
        style = pick(STYLES, generator)
        radius = between(0.45, 0.75, generator)
        reach = 0.95 - 0.8 * radius
        x, y = (between(-reach, reach, generator) for _ in range(2))
        turn = between(-0.3, 0.3, generator)
        sticker = Sticker(concept, style, x, y, radius, turn, self.pictures[concept][style])
        return Scene(random_ground(generator), (sticker,))

    def moving(self) -> list[str]:
        """Names of the emoji that move, for `animation`."""
        return sorted(Path(name).stem for name in self._read(MOVING[0], lambda name: name.endswith(".webp")))

    def animation(self, name: str) -> Tensor:
        """An emoji that moves: [frames, 4, SIDE, SIDE], colours multiplied by the transparency."""
        path = f"{MOVING[1]}/{name}.webp"
        (content,) = self._read(MOVING[0], lambda other: other == path).values()
        with Image.open(io.BytesIO(content)) as film:
            return torch.stack([_values(frame) for frame in ImageSequence.Iterator(film)])

    def _read(self, package: str, wanted) -> dict[str, bytes]:
        """Files of a package by name, fetched before if need be."""
        found = {}
        with tarfile.open(self._fetched(package)) as archive:
            for member in archive:
                if member.isfile() and wanted(member.name):
                    found[member.name] = archive.extractfile(member).read()
        if not found:
            raise ValueError(f"{package} does not hold what was expected in it")
        return found

    def _fetched(self, package: str) -> Path:
        path = self.folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not path.is_file():
            npm = shutil.which("npm")
            if npm is None:
                raise RuntimeError(f"{package} is fetched with npm, and there is no npm: install Node.js")
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                command = [npm, "pack", package, "--loglevel=error"]
                ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
                if ended.returncode:
                    raise RuntimeError(f"npm could not fetch {package}: {ended.stderr}")
                os.replace(Path(folder) / path.name, path)
        if hashlib.sha256(path.read_bytes()).hexdigest() != PACKAGES[package]:
            raise ValueError(f"{path} is not the {package} that was expected: its checksum differs. Delete it.")
        return path


def animated_scenes(film: Tensor, ground, frames: int, step: int, radius: float = 0.8) -> tuple[Scene, ...]:
    """Every `step`-th frame of an animation in the middle of a ground, from its beginning again where it ends."""
    chosen = film[torch.arange(frames) * step % len(film)]
    return tuple(Scene(ground, (Sticker("emoji", "fluent", 0.0, 0.0, radius, 0.0, picture),)) for picture in chosen)


def _code(name: str) -> str:
    """Code points of an emoji without the mark that only asks for colours, which packages put where they like."""
    return re.sub("-fe0f", "", name.lower())


def _words(name: str) -> str:
    """A Unicode name as plain words."""
    return " ".join(re.sub("[^a-z]+", " ", name.lower()).split())


def _picture(content: bytes) -> Tensor:
    with Image.open(io.BytesIO(content)) as image:
        return _values(image)


def _values(image: Image.Image) -> Tensor:
    """[4, SIDE, SIDE] from 0 to 1, colours multiplied by the transparency before it is scaled."""
    data = torch.frombuffer(bytearray(image.convert("RGBA").tobytes()), dtype=torch.uint8)
    values = data.view(image.height, image.width, 4).permute(2, 0, 1).float() / 255
    values = torch.cat([values[:3] * values[3:], values[3:]])
    scaled = F.interpolate(values[None], size=(SIDE, SIDE), mode="bicubic", antialias=True)[0]
    colours = (scaled[:3] / scaled[3:].clamp(min=1e-6)).clamp(0, 1)  # bicubic overshoots, in both alike
    alpha = scaled[3:].clamp(0, 1)
    return torch.cat([colours * alpha, alpha])
