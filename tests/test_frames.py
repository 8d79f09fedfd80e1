"""Reading and writing of frames; every test renders its own clip."""

import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from torch.testing import assert_close

from cove import encode, frames
from cove.encode import write_frames
from cove.frames import fit_frames, read_frames
from scripts.clip import render_clip
from tests.method_helpers import picture


def numbered(count=23, height=24, width=40):
    """Return flat grey frames, brighter by 10 levels each, so that the mean identifies the frame."""
    levels = 10 * torch.arange(1, count + 1) / 255
    return levels[:, None, None, None].expand(count, height, width, 3).clone()


def numbers(images):
    return (images.mean((1, 2, 3)) * 255 / 10).round().int().sub(1).tolist()


def save_png(path, image):
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    frame = av.VideoFrame.from_ndarray((image * 255).round().byte().contiguous().numpy(), format="rgb24")
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode()]))


def psnr(a, b):
    return -10 * (a - b).square().mean().log10().item()


@pytest.fixture
def clip(tmp_path):
    """23 numbered frames, 40 x 24 pixels, 12 per second."""
    write_frames(tmp_path / "clip.mp4", numbered(), 12)
    return tmp_path / "clip.mp4"


# Reading


def test_read_frames_returns_the_written_clip(tmp_path):
    images = picture(count=5)
    write_frames(tmp_path / "a.mp4", images, 30000 / 1001)
    read, _, fps, *_ = read_frames(tmp_path / "a.mp4")
    assert read.shape == images.shape and read.dtype == torch.float32
    assert fps == 30000 / 1001
    assert psnr(read, images) > 33  # low, for a small picture with subsampled chroma; 28 if BT.709 is read as BT.601


def test_read_frames_keeps_saturated_colours(tmp_path):
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]])
    write_frames(tmp_path / "a.mp4", colours[:, None, None].expand(5, 16, 24, 3), 7)
    assert_close(read_frames(tmp_path / "a.mp4").images.mean((1, 2)), colours, atol=3 / 255, rtol=0)


@pytest.mark.parametrize("start", [0, 1, 7])
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_read_frames_selects_start_count_and_stride(clip, start, count, stride):
    read = read_frames(clip, start, count, stride)
    assert numbers(read.images) == list(range(start, 23, stride))[: count or None]
    assert read.fps == 12 / stride


def test_read_frames_resizes_like_fit_frames(tmp_path):
    write_frames(tmp_path / "a.mp4", picture(56, 104, 3), 5)
    kept = read_frames(tmp_path / "a.mp4").images
    assert kept.shape == (3, 56, 104, 3)
    fitted = fit_frames(kept, 5, width=24, height=40).images
    # Resizing before the conversion to RGB rounds each channel separately.
    assert_close(read_frames(tmp_path / "a.mp4", width=24, height=40).images, fitted, atol=4 / 255, rtol=0)


MEMORY = """
import gc, resource, sys
from cove.frames import read_frames
gc.disable()  # count objects that wait for the collector
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip = read_frames(sys.argv[1], width=64)
print(len(clip.images), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_read_frames_does_not_keep_full_size_frames(tmp_path):
    """160 frames of 1280 x 720 are 221 MB in YUV 4:2:0 and 1.7 GB as floats; the decoder keeps a few."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for _ in range(160):
            container.mux(stream.encode(av.VideoFrame(1280, 720, "yuv420p")))
        container.mux(stream.encode())
    run = [sys.executable, "-c", MEMORY, str(tmp_path / "a.mp4")]
    count, grown = map(int, subprocess.check_output(run, cwd=Path(__file__).parents[1]).split())
    assert count == 160 and grown < 100


@pytest.mark.parametrize("expected", [0, 1, 2, 5, 9])
def test_frame_buffer_grows_beyond_the_expected_count(expected):
    buffer, pictures = frames._FrameBuffer(expected), torch.rand(5, 8, 16, 4)
    pictures[0, ..., 3] = 1
    for one in pictures:
        buffer.append(one)
    images, mask = buffer.tensors()
    assert torch.equal(images, pictures[..., :3]) and torch.equal(mask, 1 - pictures[..., 3])


def test_read_frames_decodes_only_needed_frames(clip):
    seen = []
    read_frames(clip, start=2, count=3, stride=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 7) for done in range(1, 8)]


@pytest.mark.parametrize("link", ["{path}", "file://{path}", "../{name}", "{name}"])
@pytest.mark.parametrize("name", ["list.m3u8", "list.ffconcat", "images/0.png"])
def test_read_frames_does_not_follow_playlists(tmp_path, link, name):
    path, listed = tmp_path / "outside.ts", tmp_path / "folder" / name
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 40, 24, "yuv420p"
        for image in numbered(5):
            pixels = (image * 255).byte().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    target = link.format(path=path, name=path.name)
    listed.parent.mkdir(parents=True)
    (listed.parent / path.name).write_bytes(path.read_bytes())
    if name.endswith("ffconcat"):
        listed.write_text(f"ffconcat version 1.0\nfile {target}\n")
    else:
        listed.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n")
    if name.endswith("m3u8"):  # FFmpeg follows it by default
        with av.open(str(listed)) as container:
            assert len(list(container.decode(video=0))) == 5
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_frames(listed.parent if name.endswith("png") else listed)


def test_read_frames_stops_if_progress_raises(clip):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_frames(clip, progress=stop)


def test_read_frames_applies_rotation(tmp_path):
    path, image = tmp_path / "a.mp4", picture()
    write_frames(path, image, 12)
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    place = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:place] + clockwise + data[place + len(upright) :])
    assert psnr(read_frames(path).images[0], image[0].rot90(-1, (0, 1))) > 33


def save_mkv(path, images, milliseconds):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=60)
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, time in zip(images, milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray((image * 255).round().byte().numpy(), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_read_frames_returns_the_mean_rate_of_the_selected_frames(tmp_path):
    save_mkv(tmp_path / "a.mkv", numbered(8), [0, 40, 80, 120, 620, 1120, 1620, 2120])  # 25 per second, then 2
    assert numbers(read_frames(tmp_path / "a.mkv").images) == list(range(8))
    assert read_frames(tmp_path / "a.mkv", 0, 4).fps == pytest.approx(25)
    assert read_frames(tmp_path / "a.mkv", 4, 4).fps == pytest.approx(2)
    assert read_frames(tmp_path / "a.mkv", 4, 2, 2).fps == pytest.approx(1)


def test_read_frames_corrects_the_rate_for_rounded_timestamps(tmp_path):
    """Matroska stores milliseconds: at 60 per second two frames are 16 or 17 ms apart, apparently 62.5 or 58.8."""
    save_mkv(tmp_path / "a.mkv", numbered(7), [0, 17, 33, 50, 67, 83, 100])
    for start in range(6):
        assert read_frames(tmp_path / "a.mkv", start, 2).fps == pytest.approx(60)


def test_read_frames_sorts_images_of_a_folder_naturally(tmp_path):
    images = numbered(11)
    for index, image in enumerate(images):
        save_png(tmp_path / f"Frame{index}.png" if index % 2 else tmp_path / f"frame{index}.png", image)
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / "._frame1.png").write_bytes(b"macOS metadata")
    (tmp_path / "frame5.png.d").mkdir()
    read, _, fps, *_ = read_frames(tmp_path, start=1, count=5, stride=2)
    assert_close(read, images[1::2], atol=1e-6, rtol=0)
    assert fps == frames.IMAGE_FPS / 2


def test_read_frames_accepts_a_percent_sign_in_a_name(tmp_path):
    for name, image in zip(["a0.png", "a1.png", "a%d.png"], numbered(3), strict=True):
        save_png(tmp_path / name, image)  # FFmpeg would find a0.png under the third name
    assert numbers(read_frames(tmp_path).images) == [0, 1, 2]


@pytest.mark.parametrize("size, count, fps", [((480, 480), 27, 12), ((320, 512), 9, 12), ((512, 512), 31, 20)])
def test_read_frames_reads_textured_clips(tmp_path, size, count, fps):
    path = render_clip(tmp_path / "clip.mp4", count, size[1], size[0], fps)
    images, _, rate, *_ = read_frames(path, width=64)
    assert images.shape == (count, round(size[0] * 8 / size[1]) * 8, 64, 3) and rate == fps
    whole = read_frames(path, start=2, count=3, stride=3).images
    assert whole.shape == (3, *size, 3) and whole.min() >= 0 and whole.max() <= 1
    fitted = fit_frames(whole, 12, width=64).images
    assert (fitted - images[2:9:3]).abs().mean() < 0.01  # chroma is resized before or after upsampling


# Errors


@pytest.mark.parametrize("start, count, stride, needs, mend", [
    (0, 24, 1, 24, "count to 23 or less"), (7, 6, 4, 28, "count to 4 or less"), (22, 2, 1, 24, "count to 1 or less"),
    (23, 1, 1, 24, "start to 22 or less"), (31, 0, 3, 32, "start to 22 or less"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["video", "folder"])
def test_read_frames_refuses_more_frames_than_exist(clip, kind, start, count, stride, needs, mend):
    path = clip
    if kind == "folder":
        path = clip.parent / "images"
        path.mkdir()
        for index, image in enumerate(numbered()):
            save_png(path / f"{index}.png", image)
    with pytest.raises(ValueError, match=rf"{path.name} has 23 frames, but .* needs {needs}\. Set {mend}"):
        read_frames(path, start, count, stride)
    if "count" in mend:
        usable = int(mend.split()[2])
        assert len(read_frames(path, start, usable, stride).images) == usable


def test_read_frames_refuses_more_frames_than_exist_before_decoding(clip):
    seen = []
    with pytest.raises(ValueError, match="has 23 frames"):
        read_frames(clip, count=24, progress=lambda *_: seen.append(1))
    assert not seen


def test_read_frames_ignores_a_frame_count_that_is_smaller_than_the_clip(tmp_path):
    avi = tmp_path / "a.avi"
    with av.open(str(avi), "w") as container:
        stream = container.add_stream("mjpeg", rate=12)
        stream.width, stream.height, stream.pix_fmt = 40, 24, "yuvj420p"
        for image in numbered():
            frame = av.VideoFrame.from_ndarray((image * 255).round().byte().numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = bytearray(avi.read_bytes())
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, 5)  # dwLength: frames of the stream
    avi.write_bytes(data)
    with av.open(str(avi)) as container:
        assert container.streams.video[0].frames == 5
    assert numbers(read_frames(avi, count=23).images) == list(range(23))


@pytest.mark.parametrize("content", [b"", b"this is no video" * 99], ids=["empty", "text"])
def test_read_frames_refuses_files_that_are_not_video(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be decoded .*convert it to an H\.264 mp4"):
        read_frames(tmp_path / "a.mp4")


def test_read_frames_refuses_a_truncated_file(clip):
    clip.write_bytes(clip.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"clip\.mp4 cannot be decoded"):
        read_frames(clip)


def test_read_frames_names_a_broken_image(tmp_path):
    for index, image in enumerate(numbered(3)):
        save_png(tmp_path / f"{index}.png", image)
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1\.png cannot be decoded"):
        read_frames(tmp_path)


def test_read_frames_refuses_a_file_with_audio_only(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(torch.zeros(1, 800, dtype=torch.int16).numpy(), "s16", "mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(ValueError, match=r"a\.wav has no video stream \(it holds audio\)"):
        read_frames(tmp_path / "a.wav")


def test_read_frames_names_an_image_of_another_size(tmp_path):
    for index, height in enumerate([24, 24, 16]):
        save_png(tmp_path / f"{index}.png", picture(height)[0])
    with pytest.raises(ValueError, match=r"2\.png is 40 x 16 pixels, but 0\.png is 40 x 24"):
        read_frames(tmp_path)
    assert len(read_frames(tmp_path, count=2).images) == 2


def test_read_frames_refuses_a_missing_file_and_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        read_frames(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="holds no images"):
        read_frames(tmp_path)


@pytest.mark.parametrize("arguments, message", [
    ({"start": -1}, "start is -1; expected 0"), ({"count": -2}, "count is -2"), ({"stride": 0}, "stride is 0"),
    ({"width": 500}, "width is 500; expected a multiple of 8, such as 496"), ({"height": 3}, "height is 3.*such as 8"),
    ({"width": -8}, "width is -8"), ({"fit": "zoom"}, 'fit is "zoom"; expected one of crop, pad, stretch'),
])  # fmt: skip
def test_read_frames_refuses_arguments_out_of_range(clip, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_frames(clip, **arguments)


@pytest.mark.parametrize("images", [torch.rand(5, 16, 3), torch.rand(2, 3, 16, 16), torch.ones(2, 8, 8, 3).byte()])
def test_write_frames_refuses_tensors_that_are_not_images(tmp_path, images):
    with pytest.raises(ValueError, match="expected floats"):
        write_frames(tmp_path / "a.mp4", images, 5)


# Writing


@pytest.mark.parametrize("before", [None, b"what was there"], ids=["no file", "old file"])
@pytest.mark.parametrize("failure", ["nan", "interrupt", "encoder"])
def test_write_frames_leaves_no_file_after_a_failure(tmp_path, monkeypatch, failure, before):
    path, seen = tmp_path / "a.mp4", []
    images = picture(count=97)  # x264 looks 50 frames ahead before anything reaches the file
    if before is not None:
        path.write_bytes(before)

    def progress(done, total):
        seen.append([file.name for file in tmp_path.iterdir()])
        if failure == "interrupt" and done == 83:
            raise KeyboardInterrupt

    class Encoder:
        @staticmethod
        def from_ndarray(pixels, format, real=av.VideoFrame):
            if len(seen) == 83:
                raise OSError("No space left on device")
            return real.from_ndarray(pixels, format=format)

    if failure == "nan":
        images[83, 5, 7] = torch.nan
    if failure == "encoder":
        monkeypatch.setattr(encode.av, "VideoFrame", Encoder)
    error = {"nan": ValueError, "interrupt": KeyboardInterrupt, "encoder": OSError}[failure]
    with pytest.raises(error, match="Frame 83 holds NaN" if failure == "nan" else None):
        write_frames(path, images, 5, progress)

    assert len(seen) == 83 and any(name.endswith(".tmp") for name in seen[-1])  # the failure occurred midway
    assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else ["a.mp4"])
    assert before is None or path.read_bytes() == before


def test_write_frames_replaces_an_existing_file(clip):
    write_frames(clip, numbered(3), 5)
    assert numbers(read_frames(clip).images) == [0, 1, 2]
    assert [file.name for file in clip.parent.iterdir()] == ["clip.mp4"]


def test_write_frames_clamps_values_to_0_to_1(tmp_path):
    write_frames(tmp_path / "a.mp4", torch.stack([torch.full((16, 24, 3), 1.7), torch.full((16, 24, 3), -0.7)]), 5)
    assert_close(read_frames(tmp_path / "a.mp4").images.mean((1, 2, 3)), torch.tensor([1.0, 0.0]), atol=0.01, rtol=0)


@pytest.mark.parametrize("fps", [0.4, 12, 23.976, 24000 / 1001, 30000 / 7007, 120])
def test_write_frames_keeps_the_rate(tmp_path, fps):
    write_frames(tmp_path / "a.mp4", numbered(5), fps)
    assert read_frames(tmp_path / "a.mp4").fps == pytest.approx(fps, rel=1e-4)


@pytest.mark.parametrize("name, shape, fps, message", [
    ("a.mp4", (2, 17, 24, 3), 5, "24 x 17 pixels; H.264 needs both even"), ("a.mp4", (2, 16, 25, 3), 5, "25 x 16"),
    ("a.mp4", (2, 16, 24, 3), 0, "fps is 0"), ("a.mp4", (2, 16, 24, 3), float("nan"), "fps is nan"),
    ("a.avi", (2, 16, 24, 3), 5, "ending in .mp4"), ("none/a.mp4", (2, 16, 24, 3), 5, "folder that exists"),
])  # fmt: skip
def test_write_frames_refuses_odd_sizes_rates_and_paths(tmp_path, name, shape, fps, message):
    with pytest.raises(ValueError, match=message):
        write_frames(tmp_path / name, torch.rand(shape), fps)
    assert not list(tmp_path.iterdir())
