"""Frames come out as players show them, whatever the file says of how it is to be shown."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext
from PIL import Image, ImageOps
from torch.testing import assert_close

from cove.encode import write_frames
from cove.frames import read_frames
from cove.timeline import Timeline
from tests.clip_files import BLUE, GREEN, RED, colours, near, quarters, tagged, tone, write

GREY = (20, 20, 20)
UPRIGHT = [RED, GREEN, BLUE, GREY]


def shown(path, **settings):
    return read_frames(path, **settings).images


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


# --- streams ---


@pytest.mark.parametrize("default", [0, 1])
def test_read_frames_reads_the_default_stream(tmp_path, default):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for index, size in enumerate([(32, 16), (96, 64)]):
            stream = container.add_stream("ffv1", rate=12)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.disposition = av.stream.Disposition.default.value if index == default else 0
            streams.append(stream)
        for _ in range(3):
            for stream in streams:
                container.mux(stream.encode(av.VideoFrame(stream.width, stream.height, "yuv420p")))
        for stream in streams:
            container.mux(stream.encode())
    assert shown(path).shape == [(3, 16, 32, 3), (3, 64, 96, 3)][default]


@pytest.mark.parametrize(("name", "codec", "tag", "other"), [
    ("a.mp4", "libx264", b"avc1", b"zzz1"), ("a.mkv", "ffv1", b"V_FFV1", b"V_XXXX"),
])  # fmt: skip
def test_read_frames_refuses_an_unknown_codec(tmp_path, name, codec, tag, other):
    path = write(tmp_path / name, quarters(3), codec)
    path.write_bytes(path.read_bytes().replace(tag, other))
    with pytest.raises(ValueError, match=r"a\.mp4|a\.mkv has a codec that FFmpeg cannot decode"):
        read_frames(path)


# --- animated images ---


@pytest.mark.parametrize("suffix", ["gif", "apng", "webp"])
def test_read_frames_reads_animated_images(tmp_path, suffix):
    images = [Image.fromarray((image * 255).round().byte().numpy()) for image in quarters(5)]
    path = tmp_path / f"a.{suffix}"
    kind = {"apng": {"format": "PNG"}, "webp": {"lossless": True}}.get(suffix, {})
    images[0].save(path, save_all=True, append_images=images[1:], duration=80, **kind)
    clip = read_frames(path)
    assert len(clip.images) == 5 and clip.fps == pytest.approx(12.5) and not clip.mask.any()
    for index in range(5):
        assert near(colours(clip.images[index]), [RED, GREEN, BLUE, (20 + 12 * index,) * 3], 2)
    assert len(read_frames(path, start=1, count=2, stride=2).images) == 2
    with pytest.raises(ValueError, match=f"a.{suffix} has 5 frames"):
        read_frames(path, count=6)


@pytest.mark.parametrize("duration", [40, 80, 500])
def test_read_frames_derives_the_rate_from_two_frames(tmp_path, duration):
    images = [Image.fromarray((image * 255).round().byte().numpy()) for image in quarters(2)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=duration, lossless=True)
    assert read_frames(tmp_path / "a.webp").fps == pytest.approx(1000 / duration)


def test_read_frames_names_a_broken_animated_webp(tmp_path):
    images = [Image.fromarray((image * 255).round().byte().numpy()) for image in quarters(5)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:])
    data = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "a.webp").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.webp cannot be decoded"):
        read_frames(tmp_path / "a.webp")


# --- wrong headers and damaged files ---


def announce(path, frames):
    """Make the header of an AVI announce this number of frames."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, frames)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("count", [0, 6, 4])
def test_read_frames_reads_what_exists_if_the_header_announces_more(tmp_path, count):
    path = announce(write(tmp_path / "a.avi", quarters(), "mjpeg", "yuvj420p"), 40_000_000)
    clip = read_frames(path, count=count)
    assert len(clip.images) == (count or 6)
    assert any("announces 40000000 frames, but has 6 frames" in note for note in clip.notes) == (count == 0)
    with pytest.raises(ValueError, match=r"a\.avi has 6 frames, but .* Set count to 6 or less"):
        read_frames(path, count=100_000)


@pytest.mark.parametrize(("first", "later"), [((64, 96), (96, 64)), ((64, 96), (32, 48)), ((32, 48), (72, 136))])
@pytest.mark.parametrize("width", [0, 48])
def test_read_frames_fits_changing_sizes_to_the_first(tmp_path, first, later, width):
    parts = [write(tmp_path / f"{index}.ts", quarters(6, *size)) for index, size in enumerate([first, later])]
    (tmp_path / "a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    images = shown(tmp_path / "a.ts", width=width)
    assert images.shape == (12, *((round(48 * first[0] / first[1] / 8) * 8, 48) if width else first), 3)
    assert near(colours(images[0]), UPRIGHT, 6) and near(colours(images[6]), UPRIGHT, 6)
    padded = read_frames(tmp_path / "a.ts", width=width, fit="pad").mask
    other_proportions = first[0] * later[1] != first[1] * later[0]
    assert padded[6:].mean((1, 2)).gt(0.05).all() == other_proportions


@pytest.mark.parametrize("name, codec, pix_fmt", [
    ("a.mkv", "mjpeg", "yuvj420p"), ("a.mkv", "libx264", "yuv420p"), ("a.ts", "libx264", "yuv420p"),
    ("a.mov", "png", "rgb24"),
])  # fmt: skip
def test_read_frames_skips_damage_in_the_middle(tmp_path, name, codec, pix_fmt):
    options = {"g": "1", "bf": "0"} if codec == "libx264" else {}
    path = write(tmp_path / name, torch.rand(24, 64, 96, 3), codec, pix_fmt, options=options)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 24] = bytes(len(data) // 24)
    path.write_bytes(data)
    clip = read_frames(path)
    assert 18 <= len(clip.images) <= 24
    if codec == "png":  # its decoder does not conceal errors
        assert len(clip.images) < 24 and any("frames before the damage could be decoded" in note for note in clip.notes)


@pytest.mark.parametrize("value", [b"2.000000000", b"N/A", b"00:00:xx.0"])
def test_read_frames_ignores_an_invalid_duration(tmp_path, value):
    """Matroska stores the duration as text."""
    path = write(tmp_path / "a.mkv", quarters(24), "ffv1")
    data = bytearray(path.read_bytes())
    place = data.rindex(b"00:00:02.0")
    data[place : place + 18] = value.ljust(18)
    path.write_bytes(data)
    clip = read_frames(path)
    assert len(clip.images) == 24 and clip.notes == ()


def test_read_frames_keeps_frames_after_a_damaged_one(tmp_path):
    """By default HEVC's decoder drops all frames up to the next key frame, here to the end."""
    options = {"x265-params": "log-level=0:keyint=999:bframes=0"}
    path = write(tmp_path / "a.ts", torch.rand(24, 64, 96, 3), "libx265", options=options)
    data = bytearray(path.read_bytes())
    for packet in range(len(data) // 3 // 188, len(data) // 3 // 188 + 15):
        data[packet * 188 + 40 : packet * 188 + 180] = bytes(140)
    path.write_bytes(data)
    clip = read_frames(path)
    assert len(clip.images) >= 20 and any("damaged" in note for note in clip.notes)


@pytest.mark.parametrize(("name", "options"), [
    ("a.mp4", {"movflags": "faststart"}), ("a.avi", {}), ("a.mkv", {}), ("a.flv", {}),
])  # fmt: skip
def test_read_frames_notes_a_truncated_file(tmp_path, name, options):
    sound = (tone(2, 44100), 44100) if name == "a.flv" else None
    path = write(
        tmp_path / name, torch.rand(24, 64, 96, 3), sound=sound, options={"bf": "0"}, container_options=options
    )
    whole = read_frames(path)
    assert len(whole.images) == 24 and not whole.notes
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 5 // 8])
    clip = read_frames(path)
    assert 12 <= len(clip.images) < 24
    said = f"has {len(clip.images)} frames"
    assert any("ends early" in note and said in note for note in clip.notes), clip.notes


# --- timestamps ---


def appended(tmp_path, suffix, gap):
    """Write two recordings of 6 frames at 12 per second; the second begins `gap` seconds after the first ends."""
    later = round(1000 * (0.5 + gap))
    times = [round(1000 * index / 12) for index in range(6)]
    if suffix == "mkv":
        return write(tmp_path / "a.mkv", quarters(12), "ffv1", times=[*times, *(later + time for time in times)])
    parts = []
    for index, offset in enumerate([0, later]):
        parts.append(tmp_path / f"{index}.ts")
        options = {"output_ts_offset": str(offset / 1000 + 5)}
        write(parts[-1], quarters(6), container_options=options, options={"bf": "0"})
    (tmp_path / "a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    return tmp_path / "a.ts"


@pytest.mark.parametrize("gap", [-0.4, -4, 0, 30, 3000])
@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_read_frames_notes_jumping_timestamps(tmp_path, suffix, gap):
    if suffix == "mkv" and gap < 0:
        pytest.skip("Matroska's timestamps only grow")
    clip = read_frames(appended(tmp_path, suffix, gap))
    assert len(clip.images) == 12 and clip.fps == pytest.approx(12, rel=0.01)
    assert any("jump at frame 6" in note for note in clip.notes) == (gap != 0)


def test_read_frames_finds_no_jump_in_a_slide_show(tmp_path):
    times = [0, 15_000, 40_000, 55_000, 70_000]
    clip = read_frames(write(tmp_path / "a.mkv", quarters(5), "ffv1", times=times))
    assert clip.fps == pytest.approx(4 / 70) and not clip.notes


@pytest.mark.parametrize(("times", "joined", "jumps", "positions"), [
    ([0, 0.1, 0.3, 0.2, 0.4], False, [], [0, 0.1, 0.2, 0.3, 0.4]),  # AVI with frames out of order
    ([0, 0.1, 0.1, 0.2], False, [], [0, 0.1, 0.1, 0.2]),  # a repeated timestamp
    ([0, 0.1, 0.1, 0.2], True, [], [0, 0.1, 0.1, 0.2]),
    ([None, None, 0.2, 0.3], False, [], [0, 0.1, 0.2, 0.3]),
    ([1, None, 1.2, 1.3], True, [], [0, 0.1, 0.2, 0.3]),
    ([None, None, None], False, [], [0, 0.1, 0.2]),
    ([0, 0.1, 0.2, 4.2, 4.3], True, [3], [0, 0.1, 0.2, 0.3, 0.4]),
    ([0, 0.1, 0.2, 4.2, 4.3], False, [], [0, 0.1, 0.2, 4.2, 4.3]),  # a pause
    ([0, 0.1, 0.2, 30, 30.1], False, [3], [0, 0.1, 0.2, 0.3, 0.4]),
    ([5, 5.1, 5.2, 5, 5.1, 1, 1.1], True, [3, 5], [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
])  # fmt: skip
def test_timeline_finds_jumps_and_closes_them(times, joined, jumps, positions):
    timeline = Timeline(times, usual=0.1, joined=joined)
    assert timeline.jumps == jumps and timeline.positions == pytest.approx(positions)


@pytest.mark.parametrize("frames", [3, 30, 714])
@pytest.mark.parametrize("rate", [11.9, 12, 12.01])
def test_timeline_frame_rate_does_not_drift_from_the_announced_rate(frames, rate):
    """The header announces 12; at a true rate of 11.9 that would be half a second early after a minute."""
    times = [round(index / rate, 3) for index in range(frames)]
    found = Timeline(times, 1 / 12).frame_rate(0, frames - 1, 1, [12], 0.001)
    assert abs((frames - 1) / found - times[-1]) <= 0.052
    assert rate != 12 or found == 12


def test_read_frames_adds_no_notes_to_a_clip_of_write_frames(tmp_path):
    write_frames(tmp_path / "a.mp4", quarters(), 24)
    assert read_frames(tmp_path / "a.mp4").notes == ()


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.flv", "libx264"), ("a.mkv", "libx264")])
def test_read_frames_accepts_headers_of_clips_with_b_frames(tmp_path, name, codec):
    clip = read_frames(write(tmp_path / name, quarters(12), codec, options={"bf": "2"}))
    assert len(clip.images) == 12 and clip.fps == 12 and clip.notes == ()
