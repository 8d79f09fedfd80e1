"""Frames look as in a video player: orientation, pixel aspect, colours, fields and alpha."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext
from PIL import Image, ImageOps
from torch.testing import assert_close

from cove.frames import read_frames
from tests.clip_files import BLUE, GREEN, GREY, RED, UPRIGHT, colours, near, quarters, shown, tagged, write

# --- orientation ---

# Upper left part of a display matrix -> its effect on a picture [height, width, 3].
TURNS = {
    (1, 0, 0, 1): lambda image: image,
    (-1, 0, 0, 1): lambda image: image.flip(1),
    (1, 0, 0, -1): lambda image: image.flip(0),
    (-1, 0, 0, -1): lambda image: image.flip(0, 1),
    (0, 1, 1, 0): lambda image: image.transpose(0, 1),
    (0, 1, -1, 0): lambda image: image.rot90(-1, (0, 1)),
    (0, -1, 1, 0): lambda image: image.rot90(1, (0, 1)),
    (0, -1, -1, 0): lambda image: image.transpose(0, 1).flip(0, 1),
}


@pytest.mark.parametrize("matrix", TURNS)
def test_read_frames_applies_display_matrices(tmp_path, matrix):
    path = write(tmp_path / "a.mp4", quarters())
    stored = shown(path)
    tagged(path, matrix)
    assert_close(shown(path), torch.stack([TURNS[matrix](image) for image in stored]))
    # A requested size is the size on display.
    sized = shown(path, width=40)
    assert sized.shape == (6, 64 if matrix[0] == 0 else 24, 40, 3)
    assert near(colours(sized[1]), colours(TURNS[matrix](quarters()[1])))


def test_read_frames_notes_rotations_other_than_quarter_turns(tmp_path):
    path = tagged(write(tmp_path / "a.mp4", quarters()), (0.1736, 0.9848, -0.9848, 0.1736))
    clip = read_frames(path)
    assert near(colours(clip.images[0]), [BLUE, RED, GREY, GREEN])
    assert clip.notes == ("a.mp4 is rotated by an odd angle; it was rounded to quarter turns.",)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_frames_applies_exif_orientations(tmp_path, suffix, orientation):
    image = Image.fromarray((quarters(1)[0] * 255).round().byte().numpy())
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {} if suffix in ("png", "tiff") else {"quality": 97}
    image.save(tmp_path / f"0.{suffix}", exif=exif, **quality)
    with Image.open(tmp_path / f"0.{suffix}") as saved:
        expected = torch.from_numpy(np.array(ImageOps.exif_transpose(saved).convert("RGB"))) / 255
    for clip in (tmp_path, tmp_path / f"0.{suffix}"):
        found = shown(clip)[0]
        assert found.shape == expected.shape and near(colours(found), colours(expected), 6)


def test_read_frames_applies_an_orientation_written_once_to_all_frames(tmp_path):
    path = write(tmp_path / "a.h264", quarters(12), options={"g": "12", "bf": "0"})
    with av.open(str(path)) as source:
        turn = BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=90", source.streams.video[0])
        packets = [bytes(turned) for packet in source.demux() if packet.size for turned in turn.filter(packet)]
    path.write_bytes(b"".join(packets))
    images = shown(path)
    assert images.shape == (12, 96, 64, 3)
    assert all(near([colours(image)[place] for place in (0, 2, 3)], [GREEN, RED, BLUE], 6) for image in images)


# --- pixel aspect ---


@pytest.mark.parametrize(("aspect", "size"), [
    (Fraction(64, 45), (72, 128)), (Fraction(8, 9), (80, 88)), (Fraction(2), (72, 176)), (Fraction(1), (72, 88)),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_read_frames_applies_the_pixel_aspect(tmp_path, aspect, size, suffix):
    """A 72 x 90 picture is stretched by the pixel aspect, then cropped to multiples of 8."""
    path = write(tmp_path / f"a.{suffix}", quarters(3, 72, 90), aspect=aspect)
    images = shown(path)
    assert images.shape == (3, *size, 3) and near(colours(images[0]), UPRIGHT)
    assert shown(path, width=128).shape[1] == round(128 * 72 / (90 * aspect) / 8) * 8


def test_read_frames_applies_the_pixel_aspect_of_a_rotated_clip(tmp_path):
    path = tagged(write(tmp_path / "a.mp4", quarters(2, 72, 90), aspect=Fraction(64, 45)), (0, 1, -1, 0))
    images = shown(path)
    assert images.shape == (2, 128, 72, 3) and near(colours(images[0]), [BLUE, RED, GREY, GREEN])


# --- colours ---


@pytest.mark.parametrize(("size", "matrix"), [((576, 720), "smpte170m"), ((720, 1280), "bt709"), ((608, 96), "bt709")])
def test_read_frames_guesses_the_matrix_of_untagged_clips_as_players_do(tmp_path, size, matrix):
    path = write(tmp_path / "a.mkv", quarters(1, *size), "ffv1", "yuv444p", matrix=matrix)
    assert near(colours(shown(path)[0]), UPRIGHT, 2)


@pytest.mark.parametrize(("matrix", "number"), [("bt709", 1), ("smpte170m", 6), ("smpte170m", 5), ("bt2020", 9)])
@pytest.mark.parametrize("size", [(64, 96), (720, 1280)])
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv444p10le"])
def test_read_frames_prefers_the_matrix_tag_to_the_size(tmp_path, matrix, number, size, pix_fmt):
    tags = {"colorspace": number, "color_range": 1}
    path = write(tmp_path / "a.mkv", quarters(1, *size), "ffv1", pix_fmt, matrix=matrix, tags=tags)
    assert near(colours(shown(path)[0]), UPRIGHT, 2)


TO_BT2020 = ((0.6274, 0.3293, 0.0433), (0.0691, 0.9195, 0.0114), (0.0164, 0.0880, 0.8956))  # BT.2087, annex 1


def hlg(light):
    """The OETF of BT.2100 after undoing the display's gamma; 1 = 203 of 1000 cd/m2."""
    scene = (light * 203 / 1000) ** (1 / 1.2)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return torch.where(scene <= 1 / 12, (3 * scene).sqrt(), a * (12 * scene - b).clamp(min=1e-9).log() + c)


def pq(light):
    """The inverse EOTF of BT.2100; 1 = 203 cd/m2."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = (light * 203 / 10000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


def sdr(light):
    return light ** (1 / 2.4)


CURVES = {"hlg": (hlg, 18), "pq": (pq, 16), "sdr": (sdr, 14)}


def wide(path, images, curve):
    """Write BT.709 frames as a BT.2020 camera would have recorded them."""
    function, number = CURVES[curve]
    light = images**2.4 @ torch.tensor(TO_BT2020).T
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": number, "color_range": 1}
    return write(path, function(light.clamp(0)).clamp(0, 1), "ffv1", "yuv444p10le", matrix="bt2020", tags=tags)


@pytest.mark.parametrize("curve", CURVES)
def test_read_frames_converts_bt2020_to_bt709(tmp_path, curve):
    path = wide(tmp_path / "a.mkv", quarters(3), curve)
    for index in range(3):
        assert near(colours(shown(path)[index]), [RED, GREEN, BLUE, (20 + 12 * index,) * 3], 5)


def test_read_frames_converts_p3_to_bt709(tmp_path):
    """P3 with white point D65; the matrix is the inverse of the one under test."""
    to_p3 = torch.tensor(((0.8225, 0.1774, 0.0), (0.0332, 0.9669, 0.0), (0.0171, 0.0724, 0.9108)))
    signal = (quarters(1) ** 2.4 @ to_p3.T) ** (1 / 2.4)
    tags = {"colorspace": 1, "color_primaries": 12, "color_trc": 1, "color_range": 1}
    path = write(tmp_path / "a.mkv", signal, "ffv1", "yuv444p10le", matrix="bt709", tags=tags)
    assert near(colours(shown(path)[0]), UPRIGHT, 2)


@pytest.mark.parametrize("matrix", [8, 10, 14])
def test_read_frames_notes_colours_that_cannot_be_converted(tmp_path, matrix):
    path = write(tmp_path / "a.mkv", quarters(2), "ffv1", "yuv444p", tags={"colorspace": matrix})
    assert read_frames(path).notes == (
        f"a.mkv has colours that cannot be converted (matrix {matrix} of H.273); they may look wrong.",
    )


def test_read_frames_follows_colour_tags_that_change(tmp_path):
    """Two recordings, the second in HLG, where grey at half signal is 203 nits, SDR white."""
    parts = []
    for index, transfer in enumerate([1, 18]):
        parts.append(tmp_path / f"{index}.ts")
        tags = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer}
        write(parts[-1], torch.full((6, 64, 96, 3), 0.5), tags=tags, options={"bf": "2", "qp": "1"})
    (tmp_path / "a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    both, one, other = (shown(tmp_path / name) for name in ("a.ts", "0.ts", "1.ts"))
    if not hasattr(av.VideoFrame, "color_trc"):
        pytest.skip("this PyAV knows the colours of the stream only")
    assert (one[0] - other[0]).abs().max() > 0.05
    assert_close(both, torch.cat([one, other]), atol=0.01, rtol=0)


@pytest.mark.parametrize("curve", ["hlg", "pq"])
def test_read_frames_keeps_order_and_hue_of_highlights(tmp_path, curve):
    nits = torch.tensor([50.0, 142, 203, 400, 700, 1000])
    images = (nits / 203).pow(1 / 2.4)[:, None, None, None].expand(6, 16, 24, 3).clone()
    images[..., 2] *= 0.5  # yellow
    found = shown(wide(tmp_path / "a.mkv", images, curve))[:, 8, 12]
    assert (found[1:, 0] > found[:-1, 0]).all() and 0.98 < found[-1, 0] <= 1
    assert_close(found[:2], images[:2, 0, 0], atol=0.02, rtol=0)  # darker than the knee
    assert 0.9 < found[2, 0] < 0.96  # SDR white
    assert_close((found[:, 2] / found[:, 0]), torch.full((6,), 0.5), atol=0.02, rtol=0)


def test_linear_from_pq_and_hlg_match_published_values():
    """BT.2408-7, table 1: SDR white, 203 cd/m2, is 58 % of PQ and 75 % of HLG."""
    from cove.hdr import linear_from_hlg, linear_from_pq

    assert_close(
        linear_from_pq(torch.tensor([0.0, 0.5807, 1])), torch.tensor([0, 1, 10_000 / 203]), rtol=2e-3, atol=1e-5
    )
    assert_close(linear_from_hlg(torch.tensor([0.0, 0.75, 1])), torch.tensor([0, 1, 1000 / 203]), rtol=2e-3, atol=1e-5)


# --- fields ---


def test_read_frames_deinterlaces_fields(tmp_path):
    """A bar moves between two fields of a frame; when combed, every second line shows it displaced."""
    fields = torch.full((24, 64, 96, 3), 0.2)
    for index in range(24):
        fields[index, :, 4 + 3 * index : 16 + 3 * index] = 0.8
    frames = fields[::2].clone()
    frames[:, 1::2] = fields[1::2, 1::2]
    options = {"x264-params": "tff=1", "flags": "+ildct+ilme", "crf": "4"}
    path = write(tmp_path / "a.mp4", frames, rate=25, options=options)
    clip = read_frames(path)
    assert len(clip.images) == 12 and clip.fps == 25
    combed = (frames[:, 1:] - frames[:, :-1]).abs().mean()
    assert (clip.images[:, 1:] - clip.images[:, :-1]).abs().mean() < 0.2 * combed
    nearest = min((clip.images - fields[first::2]).abs().mean() for first in (0, 1))
    assert nearest < 0.3 * (frames - fields[::2]).abs().mean()
    # Frames between the selected ones also feed the deinterlacer.
    assert_close(read_frames(path, start=5, count=3, stride=2).images, clip.images[5:10:2])


def test_deinterlace_keeps_progressive_frames(tmp_path):
    path = write(tmp_path / "a.mp4", quarters())
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
    from cove.convert import deinterlace

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="yuv420p") for frame in deinterlace(container.decode(video=0))]
    assert all(np.array_equal(one, other) for one, other in zip(plain, frames, strict=True))


# --- alpha ---


def with_alpha(count=3):
    """Return quarters with alpha: upper left magenta and transparent, upper right half transparent."""
    images = torch.cat([quarters(count), torch.ones(count, 64, 96, 1)], dim=-1)
    images[:, :32, :48] = torch.tensor([1.0, 0, 1, 0])
    images[:, :32, 48:, 3] = 0.5
    return images


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), [
    ("a.webm", "libvpx-vp9", "yuva420p"), ("a.mkv", "ffv1", "yuva444p"),
    ("a.mkv", "ffv1", "yuva444p10le"), ("a.mov", "prores_ks", "yuva444p10le"), ("a.mov", "png", "rgba"),
    ("a.apng", "apng", "rgba"),
])  # fmt: skip
def test_read_frames_shows_transparent_areas_black(tmp_path, name, codec, pix_fmt):
    path = write(tmp_path / name, with_alpha(), codec, pix_fmt)
    clip = read_frames(path)
    half = [value // 2 for value in GREEN]
    assert near(colours(clip.images[0]), [(0, 0, 0), half, BLUE, GREY], 6)
    assert_close(clip.mask[:, 16, [24, 72]], torch.tensor([[1.0, 0.5]]).expand(3, 2), atol=0.02, rtol=0)
    assert not clip.mask[:, 40:].any()
    # No magenta bleeds into the edge to the blue quarter below.
    small = read_frames(path, width=40)
    edge, shows = small.images[:, 8:20, :16, 0], 1 - small.mask[:, 8:20, :16]
    most = 0.2 if pix_fmt == "yuva420p" else 0.04  # chroma subsampling mixes neighbouring colours
    assert ((edge - shows * BLUE[0] / 255).abs() < most).all() and ((0.2 < shows) & (shows < 0.8)).any()


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_read_frames_applies_colour_tags_of_clips_with_alpha(tmp_path, codec):
    """VP8 has its tags in the container only, and its alpha needs another decoder."""
    options = {"auto-alt-ref": "0"}
    path = write(
        tmp_path / "a.webm", with_alpha(), codec, "yuva420p", matrix="bt709", tags={"colorspace": 1}, options=options
    )
    assert near(colours(shown(path)[0])[2:], [BLUE, GREY], 6)


def test_read_frames_composites_images_with_alpha(tmp_path):
    for index, image in enumerate(with_alpha()):
        Image.fromarray((image * 255).round().byte().numpy()).save(tmp_path / f"{index}.png")
    clip = read_frames(tmp_path)
    assert near(colours(clip.images[2]), [(0, 0, 0), (20, 90, 30), BLUE, (44, 44, 44)], 1)
    assert (clip.mask[:, :32, :48] == 1).all() and not clip.mask[:, 32:].any()


def test_read_frames_ignores_opaque_alpha(tmp_path):
    images = torch.rand(3, 24, 40, 3)
    for index, image in enumerate(images):
        Image.fromarray((image * 255).byte().numpy()).convert("RGBA").save(tmp_path / f"{index}.png")
    clip = read_frames(tmp_path)
    assert torch.equal((clip.images * 255).round(), (images * 255).floor()) and not clip.mask.any()
