"""Reading of video files: streams, animated images, wrong headers, damage and timestamps."""

import struct

import av
import pytest
import torch
from PIL import Image

from cove.encode import write_frames
from cove.frames import read_frames
from cove.timeline import Timeline
from tests.clip_files import BLUE, GREEN, RED, UPRIGHT, colours, near, quarters, shown, tone, write

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
def test_read_frames_reads_all_frames_despite_a_larger_count_in_the_header(tmp_path, count):
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
    stated = f"has {len(clip.images)} frames"
    assert any("ends early" in note and stated in note for note in clip.notes), clip.notes


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
