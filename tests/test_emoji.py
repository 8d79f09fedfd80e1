"""Emoji as things of the world: read from packages made here, drawn where they are, in clips with exact tracks."""

import hashlib
import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from tests.method_helpers import generator
from training import emoji as emoji_module
from training.clips import Clip, on_top
from training.emoji import MOVING, NAMES, STYLES, Emoji, animated_scenes
from training.world import Ground, Scene, caption, draw, pixels, random_ground

CODES = {"1F436": "DOG FACE", "1F98A": "FOX FACE", "2708-FE0F": "AIRPLANE", "1F6A9": "TRIANGULAR FLAG", "1F600": "GRIN"}
COLOURS = {"noto": (200, 30, 40), "twemoji": (20, 160, 60), "fluent": (30, 60, 220)}
FRAMES, SIDE = 5, 96


def picture(colour, shift=0):
    """The left half is of the colour, the right half is transparent white; 64x64."""
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    image.paste((*colour, 255), (0, 0, 32 + shift, 64))
    return image


def encoded(image, kind="PNG", **options):
    stored = io.BytesIO()
    image.save(stored, kind, **options)
    return stored.getvalue()


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The packages as npm has them, with five concepts, of which three are in all styles and of a category wanted."""
    folder = tmp_path_factory.mktemp("emoji")
    files = {package: {} for package in emoji_module.PACKAGES}
    categories = {"TRIANGULAR FLAG": "Flags", "GRIN": "Objects"}
    listed = [
        {"unified": code, "name": name, "category": categories.get(name, "Objects"), "sort_order": -order}
        for order, (code, name) in enumerate(CODES.items())
    ]
    files[NAMES[0]][NAMES[1]] = json.dumps(listed).encode()
    for style, (package, inner) in STYLES.items():
        for code, name in CODES.items():
            if name != "GRIN" or style != "fluent":
                spelled = code.lower() if style != "fluent" else code.lower().replace("-fe0f", "")
                ending, kind = (".webp", "WEBP") if style == "fluent" else (".png", "PNG")
                options = {"lossless": True} if kind == "WEBP" else {}
                files[package][f"{inner}/{spelled}{ending}"] = encoded(picture(COLOURS[style]), kind, **options)
    film = [picture((255, 255, 0), 5 * i) for i in range(FRAMES)]
    moving = encoded(film[0], "WEBP", save_all=True, append_images=film[1:], lossless=True)
    files[MOVING[0]][f"{MOVING[1]}/1f436.webp"] = moving
    checksums = {}
    for package, contents in files.items():
        path = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
        with tarfile.open(path, "w:gz") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        checksums[package] = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_module, "PACKAGES", checksums)
        yield Emoji(folder)


def test_concepts_are_those_of_every_style(emoji):
    assert list(emoji.pictures) == ["airplane", "fox face", "dog face"]  # as they are sorted, which here is backwards
    for styles in emoji.pictures.values():
        assert list(styles) == list(STYLES)
        for style, found in styles.items():
            assert found.shape == (4, emoji_module.SIDE, emoji_module.SIDE)
            quarter = emoji_module.SIDE // 4
            assert found[3, :, : quarter - 2].min() > 0.999 and found[3, :, -quarter:].max() == 0
            colour = torch.tensor(COLOURS[style]) / 255
            assert (found[:3, :, :quarter] - colour[:, None, None]).abs().max() < 0.01


def test_captions_have_known_words(emoji):
    scenes = [emoji.random_scene(generator(seed)) for seed in range(60)]
    assert {word for scene in scenes for word in caption(scene).split()} <= set(emoji.words)
    assert len(set(emoji.words)) == len(emoji.words)
    assert {scene.things[0].style for scene in scenes} == set(STYLES)
    assert {scene.things[0].concept for scene in scenes} == set(emoji.pictures)
    assert caption(scenes[0]) == caption(emoji.random_scene(generator(0)))


def test_a_sticker_is_drawn_where_it_is(emoji):
    scene = emoji.random_scene(generator(1))
    (sticker,), points = scene.things, pixels(SIDE)
    inside = sticker.inside(points)
    left = ((inside > -0.9) & (inside < torch.tensor([-0.1, 0.9]))).all(-1)
    away = (inside[..., 0] > 0.1) | (inside.abs() > 1.1).any(-1)
    assert left.sum() > 100 and away.sum() > 100
    assert torch.equal(sticker.covers(points)[left | away], left[left | away])
    drawn, bare = draw(scene, SIDE), draw(Scene(scene.ground, ()), SIDE)
    colour = torch.tensor(COLOURS[sticker.style]) / 255
    assert (drawn[:, left] - colour[:, None]).abs().max() < 0.01
    assert torch.equal(drawn[:, away], bare[:, away])


def test_an_edge_is_of_the_colours_it_mixes(emoji):
    """Colours are multiplied by the transparency before they are scaled: no seam from the transparent white."""
    sticker = next(thing for seed in range(60) for thing in emoji.random_scene(generator(seed)).things if _png(thing))
    ground = Ground("black", "plain", 0.0, 0)
    drawn, bare = draw(Scene(ground, (sticker,)), SIDE), draw(Scene(ground, ()), SIDE)
    colour = (torch.tensor(COLOURS[sticker.style]) / 255)[:, None, None]
    assert (drawn >= torch.minimum(bare, colour) - 0.01).all()
    assert (drawn <= torch.maximum(bare, colour) + 0.01).all()
    edge = sticker.outside(torch.tensor([[-0.006, 0.0], [0.006, 0.0]]))
    assert sticker.covers(edge).tolist() == [True, False]


def _png(sticker):
    """WebP forgets the colours of what cannot be seen."""
    return sticker.style != "fluent"


def test_emoji_that_move_have_their_mask(emoji):
    assert emoji.moving() == ["1f436"]
    film = emoji.animation("1f436")
    assert film.shape == (FRAMES, 4, emoji_module.SIDE, emoji_module.SIDE)
    shares = film[:, 3].mean((1, 2))
    assert (shares - (32 + 5 * torch.arange(FRAMES)) / 64).abs().max() < 0.01
    scenes = animated_scenes(film, random_ground(generator(3)), frames=7, step=2, radius=0.8)
    clip = Clip(scenes)
    assert clip.draw(SIDE).shape == (7, SIDE, SIDE, 3)
    masks = torch.stack([on_top(scene, pixels(SIDE)) == 0 for scene in scenes])
    expected = 0.8**2 * shares[torch.arange(7) * 2 % FRAMES]
    assert (masks.float().mean((1, 2)) - expected).abs().max() < 0.02


def test_a_package_that_is_another_is_refused(emoji, tmp_path):
    package = NAMES[0]
    other = tmp_path / (package.replace("@", "-") + ".tgz")
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"its checksum differs. Delete it"):
        Emoji(tmp_path).pictures  # noqa: B018


def test_without_npm_the_error_says_so(emoji, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="there is no npm"):
        Emoji(tmp_path / "empty").pictures  # noqa: B018
