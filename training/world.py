"""A world of flat shapes on textured grounds: endless pictures, the captions that are true of them, and exact motion.

A scene is drawn back to front, each thing in coordinates of its own: +-1 is its edge, whatever its place, size and
angle. What is drawn on a thing is a function of those coordinates, so it moves with the thing, and the place of any of
its points in another frame is known exactly.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

COLOURS = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.87, 0.15),
    "green": (0.13, 0.60, 0.22),
    "blue": (0.12, 0.32, 0.85),
    "purple": (0.55, 0.20, 0.70),
    "white": (0.96, 0.96, 0.96),
    "black": (0.10, 0.10, 0.12),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
GROUNDS = ("plain", "cloudy", "tiled")

OUTLINE = 0.09  # width of a thing's dark edge, as a share of its radius
NOISE = 8  # a cloudy ground is that many random values a side, made smooth


class Placed:
    """Something somewhere. The picture spans -1 to 1, x to the right, y down; `angle` in radians, clockwise as seen."""

    x: float
    y: float
    radius: float
    angle: float

    def inside(self, points: Tensor) -> Tensor:
        """Points of the picture, [..., 2] as (x, y), in the thing's own coordinates."""
        turned = (points - points.new_tensor([self.x, self.y])) / self.radius
        c, s = math.cos(self.angle), math.sin(self.angle)
        return torch.stack([c * turned[..., 0] + s * turned[..., 1], c * turned[..., 1] - s * turned[..., 0]], -1)

    def outside(self, points: Tensor) -> Tensor:
        """The inverse of `inside`."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        turned = torch.stack([c * points[..., 0] - s * points[..., 1], s * points[..., 0] + c * points[..., 1]], -1)
        return turned * self.radius + points.new_tensor([self.x, self.y])


@dataclass(frozen=True)
class Thing(Placed):
    """One shape, of one colour and texture."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float

    def distance(self, points: Tensor) -> Tensor:
        """How far points of the picture, [..., 2], lie outside the edge, in picture units; negative inside."""
        return SHAPES[self.shape](self.inside(points)) * self.radius

    def covers(self, points: Tensor) -> Tensor:
        """Whether points of the picture, [..., 2], lie on it."""
        return self.distance(points) < 0

    def look(self, points: Tensor, pixel: float) -> tuple[Tensor, Tensor]:
        """Its colours [..., 3] and how much of what lies behind they hide [..., 1], at points of the picture."""
        distance = self.distance(points)
        return _paint(self, self.inside(points), distance, pixel), soft_step(-distance, pixel)[..., None]

    @property
    def words(self) -> str:
        return _named(self.texture, self.colour, self.shape)


@dataclass(frozen=True)
class Ground:
    """What lies behind. `x`, `y` and `zoom` move it as a camera would; `tilt` is where its gradient points."""

    colour: str
    kind: str
    tilt: float
    seed: int
    x: float = 0.0
    y: float = 0.0
    zoom: float = 1.0

    def inside(self, points: Tensor) -> Tensor:
        return (points - points.new_tensor([self.x, self.y])) / self.zoom

    def outside(self, points: Tensor) -> Tensor:
        return points * self.zoom + points.new_tensor([self.x, self.y])


@dataclass(frozen=True)
class Scene:
    ground: Ground
    things: tuple[Thing, ...]  # back to front; or `emoji.Sticker`s


# ---- shapes: distance to the edge in a thing's own coordinates, [..., 2] -> [...]; the y axis points down ----


def _box(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


def _polygon(p: Tensor, corners: int, inner: float) -> Tensor:
    """A star with a corner up, its inner corners at `inner`; a regular polygon where `inner` is cos(pi / corners)."""
    half = math.pi / corners
    angle = (torch.atan2(p[..., 0], -p[..., 1]) + half) % (2 * half) - half
    radius = p.norm(dim=-1)
    x, y = radius * angle.sin().abs(), radius * angle.cos()
    inner_x, inner_y = inner * math.sin(half), inner * math.cos(half)
    edge_x, edge_y = inner_x, inner_y - 1
    return (edge_x * (y - 1) - edge_y * x) / math.hypot(edge_x, edge_y)


def _heart(p: Tensor) -> Tensor:
    """A square that stands on its corner, and a disc on each of its upper sides."""
    x, y = p[..., 0].abs(), p[..., 1] - 0.08
    disc = torch.hypot(x - 0.375, y + 0.375) - 0.53
    return torch.minimum(disc, (x + y.abs() - 0.75) / math.sqrt(2))


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "circle": lambda p: p.norm(dim=-1) - 0.9,
    "square": lambda p: _box(p[..., 0], p[..., 1], 0.78, 0.78),
    "triangle": lambda p: _polygon(p, 3, 0.5),
    "star": lambda p: _polygon(p, 5, 0.42),
    "heart": _heart,
    "ring": lambda p: (p.norm(dim=-1) - 0.66).abs() - 0.27,
    "cross": lambda p: torch.minimum(_box(p[..., 0], p[..., 1], 0.95, 0.32), _box(p[..., 0], p[..., 1], 0.32, 0.95)),
    "moon": lambda p: torch.maximum(p.norm(dim=-1) - 0.95, 0.72 - (p - p.new_tensor([0.5, 0.0])).norm(dim=-1)),
}


# ---- drawing ----


def soft_step(value: Tensor, softness: float) -> Tensor:
    """0 below zero, 1 above, and a straight slope `softness` wide between."""
    return (value / softness + 0.5).clamp(0, 1)


def _pattern(texture: str, p: Tensor, pixel: float) -> Tensor:
    """Where a thing shows its second colour, 0 to 1."""
    x, y = p[..., 0], p[..., 1]
    match texture:
        case "striped":
            return soft_step(0.125 - ((y % 0.5) - 0.25).abs(), pixel)
        case "dotted":
            return soft_step(0.13 - torch.hypot((x % 0.5) - 0.25, (y % 0.5) - 0.25), pixel)
        case "checkered":
            wave = torch.minimum(*torch.broadcast_tensors(*(0.25 - ((a % 1.0) - 0.5).abs() for a in (x, y))))
            other = torch.minimum(*(0.25 - (((a + 0.5) % 1.0) - 0.5).abs() for a in (x, y)))
            return soft_step(torch.maximum(wave, other), pixel)
    return torch.zeros_like(x)


def clouds(seed: int, p: Tensor) -> Tensor:
    """Smooth noise of mean 0 over the plane; it repeats after 4 units, far outside the picture."""
    values = torch.randn(1, 1, NOISE, NOISE, generator=Generator().manual_seed(seed))
    around = F.pad(values, (2, 2, 2, 2), mode="circular")
    place = ((p / 4 + 0.5) % 1.0 * NOISE + 2) / (NOISE + 4) * 2 - 1
    return F.grid_sample(around, place[None], mode="bicubic", align_corners=False)[0, 0]


def _ground(ground: Ground, points: Tensor, pixel: float) -> Tensor:
    p = ground.inside(points)
    # Paler than the things, so that a red star shows on a red ground.
    base = 0.62 * p.new_tensor(COLOURS[ground.colour]) + 0.38 * 0.62
    light = 1 + 0.22 * (p[..., 0] * math.cos(ground.tilt) + p[..., 1] * math.sin(ground.tilt)).clamp(-1.5, 1.5)
    match ground.kind:
        case "cloudy":
            light = light + 0.16 * clouds(ground.seed, p).clamp(-2, 2)
        case "tiled":
            gap = torch.minimum(*((a % 0.5 - 0.25).abs() for a in (p[..., 0], p[..., 1])))
            light = light * (1 - 0.45 * soft_step(0.035 - gap, pixel / ground.zoom))
    return (base * light[..., None]).clamp(0, 1)


def _paint(thing: Thing, p: Tensor, distance: Tensor, pixel: float) -> Tensor:
    colour = p.new_tensor(COLOURS[thing.colour])
    # Patterns are drawn in a pale tint, and on white in grey.
    second = p.new_tensor([0.55, 0.55, 0.58]) if thing.colour in ("white", "black") else 0.25 * colour + 0.75
    pattern = _pattern(thing.texture, p, pixel / thing.radius)[..., None]
    light = 1 - 0.14 * (p[..., :1] + p[..., 1:]).clamp(-1.4, 1.4)
    edge = soft_step(distance / thing.radius + OUTLINE, pixel / thing.radius)[..., None]
    return (((1 - pattern) * colour + pattern * second) * light).clamp(0, 1) * (1 - 0.7 * edge)


def pixels(size: int) -> Tensor:
    """Centres of the pixels, or of the tokens, of a square picture as (x, y): [size, size, 2]."""
    along = (torch.arange(size) + 0.5) / size * 2 - 1
    return torch.stack(torch.meshgrid(along, along, indexing="xy"), -1)


def draw(scene: Scene, size: int) -> Tensor:
    """The picture, [3, size, size], float32 from 0 to 1, edges smooth over one pixel."""
    points, pixel = pixels(size), 2 / size
    picture = _ground(scene.ground, points, pixel)
    for thing in scene.things:
        colour, covered = thing.look(points, pixel)
        picture = picture + covered * (colour - picture)
    return picture.permute(2, 0, 1)


# ---- words ----


def _named(texture: str, colour: str, noun: str) -> str:
    words = f"{colour} {noun}" if texture == "plain" else f"{texture} {colour} {noun}"
    return f"an {words}" if words.startswith("orange") else f"a {words}"


def caption(scene: Scene) -> str:
    """What the scene shows, front thing first: "a striped red star on a cloudy blue ground"."""
    things = [thing.words for thing in reversed(scene.things)]
    return f"{' and '.join(things)} on {_named(scene.ground.kind, scene.ground.colour, 'ground')}"


GROUND_WORDS = ("a", "an", "and", "on", "ground", *COLOURS, *GROUNDS[1:])  # what every caption may have
WORDS = ("a", "an", "and", "on", "ground", *COLOURS, *SHAPES, *TEXTURES, *GROUNDS[1:])


# ---- chance and motion ----


HELD_OUT = 10**9  # chance from this number on is never trained on


def held_out(number: int) -> Generator:
    """The chance of a scene, or of several, that nothing was trained on."""
    return Generator().manual_seed(HELD_OUT + number)


def pick(choices, generator: Generator):
    return list(choices)[int(torch.randint(len(choices), (), generator=generator))]


def between(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def random_scene(generator: Generator, most: int = 2) -> Scene:
    """One thing on a ground of another colour, and in a tenth of the scenes, where `most` allows, a second one."""
    several = most > 1 and float(torch.rand((), generator=generator)) < 0.1
    things: list[Thing] = []
    for _ in range(2 if several else 1):
        radius = between(0.32, 0.5, generator) if several else between(0.4, 0.75, generator)
        reach = 0.95 - 0.8 * radius
        things.append(
            Thing(
                shape=pick(SHAPES, generator),
                colour=pick([colour for colour in COLOURS if colour not in {t.colour for t in things}], generator),
                texture=pick(TEXTURES, generator),
                x=between(-reach, reach, generator),
                y=between(-reach, reach, generator),
                radius=radius,
                angle=between(0, 2 * math.pi, generator),
            )
        )
    return Scene(random_ground(generator, {thing.colour for thing in things}), tuple(things))


def random_ground(generator: Generator, taken: Collection[str] = ()) -> Ground:
    """Of none of the colours that are taken."""
    return Ground(
        colour=pick([colour for colour in COLOURS if colour not in taken], generator),
        kind=pick(GROUNDS, generator),
        tilt=between(0, 2 * math.pi, generator),
        seed=int(torch.randint(2**31, (), generator=generator)),
        x=between(-1, 1, generator),
        y=between(-1, 1, generator),
    )
