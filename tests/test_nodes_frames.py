"""Load Frames: its list of files, its outputs, and VIDEO instead of a file."""

import io
import shutil

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from scripts.host import PromptFailed
from tests.clip_files import quarters, tagged, tone, write
from tests.helpers import call, refused

RATE, FPS, FRAMES = 8000, 10, 9
WHOLE = {"start": 0, "count": 0, "stride": 1, "width": 0, "height": 0, "fit": "crop"}


@pytest.fixture
def clip(base):
    """Name of a clip in the input folder: 9 frames, 10 per second, with audio."""
    path, options = base / "input" / "shown.mp4", {"crf": "4", "bf": "0"}
    write(path, quarters(FRAMES), pix_fmt="yuv444p", rate=FPS, sound=(tone(FRAMES / FPS, RATE), RATE), options=options)
    yield path.name
    path.unlink()


def load(nodes, **settings):
    return call(nodes["LoadFrames"], **WHOLE | settings)


def test_load_frames_returns_images_fps_count_mask_and_audio(nodes, clip):
    names = [output.display_name for output in nodes["LoadFrames"].define_schema().outputs]
    assert names == ["images", "fps", "frame count", "mask", "audio"]
    images, fps, count, mask, audio = load(nodes, file=clip, start=1, count=3, stride=2)
    assert_close(images, quarters(FRAMES)[1:6:2], atol=0.02, rtol=0)
    assert (fps, count, mask.shape, audio["sample_rate"]) == (FPS / 2, 3, (3, 64, 96), RATE) and not mask.any()
    expected = torch.from_numpy(tone(FRAMES / FPS, RATE))[None, :, RATE // FPS : RATE // FPS * 7]
    assert_close(audio["waveform"], expected, atol=0.05, rtol=0)  # AAC


def test_load_frames_returns_no_audio_for_a_silent_clip(nodes, base):
    path = write(base / "input" / "silent.mkv", quarters(2), "ffv1")
    assert load(nodes, file="silent.mkv")[4] is None
    path.unlink()


def test_load_frames_reports_notes(nodes, base, lines):
    path = tagged(write(base / "input" / "turned.mp4", quarters()), (0.1736, 0.9848, -0.9848, 0.1736))
    load(nodes, file="turned.mp4")
    path.unlink()
    assert lines() == ["turned.mp4 is rotated by an odd angle; it was rounded to quarter turns."]


def test_load_frames_lists_animated_images_and_transport_streams(nodes, base):
    folder = base / "input" / "choices"
    folder.mkdir()
    pictures = [Image.new("RGB", (24, 16), (20 * index, 90, 90)) for index in range(3)]
    still, animated = {}, {"save_all": True, "append_images": pictures[1:], "duration": 80}
    kinds = {"a.gif": animated, "a.apng": animated | {"format": "PNG"}, "a.webp": animated, "still.webp": still}
    kinds |= {"a.png": animated, "still.png": still}
    for place in (folder, base / "input"):
        for name, kind in kinds.items():
            pictures[0].save(place / name, **kind)
        for name in ("a.ts", "a.m2ts", "a.mts", "A.MP4"):
            (place / name).write_bytes(b"")
    options = nodes["LoadFrames"].define_schema().inputs[0].options
    videos = ["a.gif", "a.apng", "a.ts", "a.m2ts", "a.mts", "A.MP4"]
    assert {*videos, *(f"choices/{name}" for name in videos), "a.webp", "a.png", "choices"} <= {*options}
    # A still is not a clip, and images in a folder belong to the folder's clip.
    stills = {"still.webp", "still.png", "choices/a.webp", "choices/a.png", "choices/still.webp", "choices/still.png"}
    assert not stills & {*options}
    for name in ("a.webp", "a.png", "choices/a.gif", "choices/a.apng"):
        assert len(load(nodes, file=name)[0]) == 3
    shutil.rmtree(folder)
    for name in (*kinds, "a.ts", "a.m2ts", "a.mts", "A.MP4"):
        (base / "input" / name).unlink()


# --- VIDEO ---


@pytest.mark.parametrize("kind", ["file", "bytes", "parts"])
def test_load_frames_reads_a_video_like_the_file(nodes, base, clip, kind):
    from comfy_api.input_impl import VideoFromComponents, VideoFromFile

    path = base / "input" / clip
    video = VideoFromFile(str(path) if kind == "file" else io.BytesIO(path.read_bytes()))
    if kind == "parts":
        video = VideoFromComponents(video.get_components())
    settings = {"start": 2, "count": 3, "stride": 2, "width": 48, "fit": "pad", "height": 48}
    expected = load(nodes, file=clip, **settings)
    found = load(nodes, file=None, video=video, **settings)
    assert found[1:3] == expected[1:3]
    assert_close(found[0], expected[0], atol=0.05 if kind == "parts" else 0, rtol=0)
    assert torch.equal(found[3], expected[3])
    assert found[4]["sample_rate"] == RATE
    # The host's components hold the audio as stored, with up to one packet of padding.
    assert_close(found[4]["waveform"], expected[4]["waveform"], atol=0.05 if kind == "parts" else 0, rtol=0)


@pytest.mark.parametrize(("begin", "seconds"), [(0.15, 0.3), (0.45, 0), (0, 0.34)])
def test_load_frames_reads_a_trimmed_video(nodes, base, clip, begin, seconds):
    from comfy_api.input_impl import VideoFromFile

    if not hasattr(VideoFromFile, "as_trimmed"):
        pytest.skip("this ComfyUI does not trim")
    video = VideoFromFile(str(base / "input" / clip), start_time=begin, duration=seconds)
    images, fps, count, _, audio = load(nodes, file=clip, video=video)
    within = [frame for frame in range(FRAMES) if begin <= frame / FPS < (begin + seconds if seconds else 1)]
    first, last = within[0], within[-1] + 1
    assert count == last - first and fps == FPS
    assert_close(images, quarters(FRAMES)[first:last], atol=0.02, rtol=0)
    expected = torch.from_numpy(tone(FRAMES / FPS, RATE))[None, :, first * RATE // FPS : last * RATE // FPS]
    assert_close(audio["waveform"], expected, atol=0.05, rtol=0)


def test_load_frames_reads_alpha_of_a_video(nodes):
    from comfy_api.input_impl import VideoFromComponents
    from comfy_api.util import VideoComponents

    images = torch.cat([quarters(2), torch.ones(2, 64, 96, 1)], dim=-1)
    images[:, :32, :48, 3] = 0
    video = VideoFromComponents(VideoComponents(images=images, audio=None, frame_rate=FPS))
    found, _, _, mask, audio = load(nodes, file=None, video=video)
    assert not found[:, :32, :48].any() and (mask[:, :32, :48] == 1).all() and not mask[:, 32:].any() and audio is None


def test_load_frames_is_named_in_errors_of_a_video(nodes, base, clip):
    from comfy_api.input_impl import VideoFromComponents, VideoFromFile

    video = VideoFromFile(str(base / "input" / clip))
    for some in (video, VideoFromComponents(video.get_components())):
        with refused("Load Frames", f"has {FRAMES} frames", "Set count to 9 or less"):
            load(nodes, file=None, video=some, count=FRAMES + 1)


def queued(server, clip, **inputs):
    """Return the outputs of a prompt in which Load Frames has these inputs and a missing file."""
    prompt = {
        "1": {"class_type": "LoadVideo", "inputs": {"file": clip}},
        "2": {"class_type": "CoveLoadFrames", "inputs": WHOLE | {"file": "missing.mp4"} | inputs},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
        "4": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
    }
    return server.queue(prompt, 60)


def test_load_frames_ignores_the_file_if_a_video_is_connected(server, clip):
    assert len(queued(server, clip, video=["1", 0])["3"]["images"]) == FRAMES
    with pytest.raises(PromptFailed, match=r"there is no file or folder 'missing\.mp4'"):
        queued(server, clip)
    with pytest.raises(PromptFailed, match="VIDEO is connected to count; expected INT"):
        queued(server, clip, video=["1", 0], count=["1", 0])
    with pytest.raises(PromptFailed, match="IMAGE is connected to video; expected VIDEO"):
        queued(server, clip, video=["4", 0])
