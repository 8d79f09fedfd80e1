"""Audio of the selected frames."""

import av
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cove.audio import Audio, Recording, read_audio
from cove.frames import fit_frames, read_frames
from tests.clip_files import quarters, write

RATE = 8000
FPS = 10
FRAMES = 23


def ramp(seconds=FRAMES / FPS, rate=RATE, channels=1):
    """Return samples that rise steadily, so that each identifies its time; each channel is lower than the last."""
    line = np.arange(round(seconds * rate)) / (seconds * rate) * 0.9
    return np.stack([line / (1 + channel) for channel in range(channels)])


@pytest.fixture
def clip(tmp_path):
    """23 frames, 10 per second, with a ramp of the same length."""
    return write(tmp_path / "a.mkv", quarters(FRAMES), "ffv1", rate=FPS, sound=(ramp(), RATE))


@pytest.mark.parametrize("start", [0, 1, 7])
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_read_frames_returns_audio_of_the_selected_frames(clip, start, count, stride):
    read = read_frames(clip, start, count, stride)
    assert read.audio.rate == RATE and read.audio.samples.dtype == torch.float32
    expected = torch.from_numpy(ramp()).float()[:, start * RATE // FPS :]
    length = round(len(read.images) / read.fps * RATE)
    assert read.audio.samples.shape == (1, length) and length == len(read.images) * stride * RATE // FPS
    heard = min(length, expected.shape[1])
    # Matroska's timestamps are in milliseconds, here eight samples.
    assert_close(read.audio.samples[:, :heard], expected[:, :heard], atol=0.9 * 8 / len(ramp()[0]) + 1e-4, rtol=0)
    assert not read.audio.samples[:, heard:].any()


def test_read_frames_audio_has_no_gaps_between_packets(tmp_path):
    """Matroska rounds the timestamps of packets of 1024 samples to a millisecond, here 44 samples."""
    rate = 44100
    path = write(tmp_path / "a.mkv", quarters(FRAMES), "ffv1", rate=FPS, sound=(ramp(rate=rate), rate))
    steps = read_frames(path, 3).audio.samples[0, : 19 * rate // FPS].diff() * 32768
    assert 0 <= steps.min() and steps.max() < 2  # the ramp rises by 0.3 a sample


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("suffix", ["mp4", "mov", "avi", "mkv", "ts"])
def test_read_frames_reads_audio_of_containers_and_channels(tmp_path, channels, suffix):
    rate = 44100
    samples = np.sin(2 * np.pi * 440 * np.arange(rate) / rate) * ramp(1, rate, channels)
    codec = "ffv1" if suffix in ("avi", "mkv") else "libx264"
    path = write(tmp_path / f"a.{suffix}", quarters(10), codec, rate=FPS, sound=(samples, rate))
    sound = read_frames(path, 2, 6).audio
    assert sound.rate == rate and sound.samples.shape == (channels, round(0.6 * rate))
    loudness = sound.samples.reshape(channels, 6, -1).square().mean(2).sqrt()
    expected = torch.from_numpy(samples[:, rate // 5 : rate // 5 * 4]).reshape(channels, 6, -1).square().mean(2).sqrt()
    assert_close(loudness, expected.float(), atol=0.02, rtol=0)


@pytest.mark.parametrize("channels", [6, 8])
def test_read_frames_reads_surround_audio(tmp_path, channels):
    """PyAV's own conversion of planar samples crashes the process with eight channels."""
    sound = ramp(channels=channels)
    read = read_frames(write(tmp_path / "a.mkv", quarters(FRAMES), "ffv1", rate=FPS, sound=(sound, RATE)))
    assert_close(read.audio.samples, torch.from_numpy(sound).float(), atol=2e-3, rtol=0)


def test_read_frames_pads_short_audio_with_silence(tmp_path):
    path = write(tmp_path / "a.mkv", quarters(FRAMES), "ffv1", rate=FPS, sound=(ramp(1) + 0.05, RATE))
    samples = read_frames(path).audio.samples
    assert samples.shape[1] == FRAMES * RATE // FPS
    assert samples[:, : RATE - 100].abs().min() > 0.04 and not samples[:, RATE + 100 :].any()
    late = read_frames(path, start=15).audio.samples
    assert late.shape[1] == 8 * RATE // FPS and not late.any()


def test_read_frames_returns_no_audio_for_a_silent_clip(tmp_path):
    assert read_frames(write(tmp_path / "a.mkv", quarters(3), "ffv1")).audio is None


def test_read_frames_keeps_the_audio_length_of_uneven_timestamps(tmp_path):
    """Half the frames last twice as long: the clip plays at the mean rate, and the audio keeps its length."""
    times = [*range(0, 1000, 100), *range(1000, 3000, 200)]
    path = write(tmp_path / "a.mkv", quarters(20), "ffv1", times=times, sound=(ramp(3), RATE))
    clip = read_frames(path)
    assert clip.fps == pytest.approx(19 / 2.8)
    assert clip.audio.samples.shape[1] == round(20 / clip.fps * RATE)


@pytest.mark.parametrize("gap", [0, 60, 4000])
def test_read_frames_audio_follows_jumping_timestamps(tmp_path, gap):
    """Two recordings in one file, of different loudness."""
    parts = []
    for index, loudness in enumerate([0.3, 0.6]):
        sound = (np.full((1, 48000), loudness) * np.sin(np.arange(48000) / 10), 48000)
        options = {"output_ts_offset": str(5 + index * gap)}
        path = tmp_path / f"{index}.ts"
        parts.append(write(path, quarters(10), rate=FPS, sound=sound, container_options=options, options={"bf": "0"}))
    (tmp_path / "a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    clip = read_frames(tmp_path / "a.ts")
    assert len(clip.images) == 20 and clip.fps == pytest.approx(10)
    loud = clip.audio.samples.reshape(20, -1).square().mean(1).sqrt() * 2**0.5
    assert_close(loud[1:9], torch.full((8,), 0.3), atol=0.03, rtol=0)
    assert_close(loud[11:19], torch.full((8,), 0.6), atol=0.03, rtol=0)
    part = read_frames(tmp_path / "a.ts", start=12, count=5).audio.samples
    assert part.square().mean().sqrt() * 2**0.5 == pytest.approx(0.6, abs=0.03)


def paused(path, seconds):
    """Write a clip whose frame 13 is late by `seconds` while the audio continues, as screen recorders do."""
    times = [1000 * index // FPS + (round(1000 * seconds) if index >= 13 else 0) for index in range(FRAMES)]
    write(path, quarters(FRAMES), "ffv1", times=times, sound=(ramp(FRAMES / FPS + seconds), RATE))
    return [time / 1000 for time in times]


def test_read_frames_slows_the_whole_clip_for_a_short_pause(tmp_path):
    times = paused(tmp_path / "a.mkv", 2.5)
    clip = read_frames(tmp_path / "a.mkv")
    assert clip.fps == pytest.approx(22 / times[-1]) and any("not evenly spaced" in note for note in clip.notes)
    heard = ramp(times[-1] + 0.1)
    assert_close(clip.audio.samples[:, : heard.shape[1]], torch.from_numpy(heard).float(), atol=0.01, rtol=0)


@pytest.mark.parametrize("start", [0, 5, 13, 17])
def test_read_frames_cuts_a_long_pause_from_the_audio(tmp_path, start):
    """Every frame has the audio recorded at its time."""
    times = paused(tmp_path / "a.mkv", 15)
    clip = read_frames(tmp_path / "a.mkv", start)
    assert clip.fps == pytest.approx(FPS) and any("jump at frame 13" in note for note in clip.notes)
    for index in range(start, FRAMES):
        heard = clip.audio.samples[0, round((index - start + 0.5) * RATE / FPS)].item()
        assert heard == pytest.approx((times[index] + 0.05) / 17.3 * 0.9, abs=0.003)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_read_frames_audio_of_avi_is_in_sync(tmp_path, codec, b_frames):
    """AVI has no presentation timestamps; FFmpeg's guesses are late and out of order."""
    options = {"bf": str(b_frames), "g": "12"}
    path = write(tmp_path / "a.avi", quarters(FRAMES), codec, rate=FPS, sound=(ramp(), RATE), options=options)
    clip = read_frames(path, 3)
    assert clip.fps == FPS and clip.notes == ()
    assert_close(clip.audio.samples[0], torch.from_numpy(ramp()[0, 3 * RATE // FPS :]).float(), atol=0.01, rtol=0)


def test_read_frames_audio_of_a_lost_packet_is_a_gap(tmp_path):
    """Audio after a lost packet stays in sync."""
    path = write(tmp_path / "a.mkv", quarters(FRAMES), "ffv1", rate=FPS, sound=(ramp(rate=48000) + 0.05, 48000))
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as target:
        streams = {stream: target.add_stream_from_template(stream) for stream in source.streams}
        heard = 0
        for packet in source.demux():
            if packet.dts is None:
                continue
            heard += packet.stream.type == "audio"
            if packet.stream.type == "video" or heard != 20:
                packet.stream = streams[packet.stream]
                target.mux(packet)
    before, after = (read_frames(tmp_path / name).audio.samples[0] for name in ("a.mkv", "b.mkv"))
    silent = after == 0
    assert 0.015 * 48000 < silent.sum() < 0.03 * 48000
    assert_close(after[~silent], before[~silent], atol=0.001, rtol=0)


def test_read_frames_notes_audio_that_cannot_be_decoded(tmp_path):
    path = write(tmp_path / "a.mkv", quarters(3), "ffv1", sound=(ramp(), RATE))
    path.write_bytes(path.read_bytes().replace(b"A_PCM/INT/LIT", b"A_XYZ/INT/LIT"))
    clip = read_frames(path)
    assert clip.audio is None and len(clip.images) == 3
    assert any("sound is left out" in note for note in clip.notes)


def test_read_frames_skips_damaged_audio(tmp_path):
    samples = np.sin(np.arange(96000) / 10)[None] * 0.5
    path = write(tmp_path / "a.ts", quarters(20), rate=FPS, sound=(samples, 48000), options={"bf": "0"})
    data = bytearray(path.read_bytes())
    for packet in range(len(data) // 2 // 188, len(data) // 2 // 188 + 40):  # packets of 188 bytes
        if data[packet * 188 + 1] & 31 == 1 and data[packet * 188 + 2] == 1:  # the second stream, PID 257
            data[packet * 188 + 12 : packet * 188 + 188] = bytes([255]) * 176
    path.write_bytes(data)
    read = read_frames(path)
    assert len(read.images) == 20 and read.audio.samples.shape[1] == 96000
    loud = read.audio.samples.reshape(20, -1).square().mean(1).sqrt() * 2**0.5
    assert_close(loud[[2, 17]], torch.full((2,), 0.5), atol=0.03, rtol=0)


def test_read_audio_recordings_do_not_overlap(clip):
    """Half a second of the file, then from 1.5 s on; the audio in between belongs to neither recording."""
    with av.open(str(clip)) as container:
        samples = read_audio(container, [Recording(0, -0.5), Recording(1.5, 0.5)], 0, 0.75, {}).samples
    line = torch.from_numpy(ramp()).float()
    expected = torch.cat([line[:, RATE // 2 : RATE], line[:, RATE * 3 // 2 : RATE * 7 // 4]], dim=1)
    assert_close(samples, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("start", "count", "stride"), [(0, 0, 1), (3, 5, 2), (7, 0, 3)])
def test_fit_frames_returns_audio_of_the_selected_frames(start, count, stride):
    sound = Audio(torch.from_numpy(ramp(channels=2)).float(), RATE)
    fitted = fit_frames(torch.rand(FRAMES, 16, 24, 3), FPS, sound, start, count, stride)
    length = len(fitted.images) * stride * RATE // FPS
    assert fitted.fps == FPS / stride and fitted.audio.samples.shape == (2, length)
    taken = sound.samples[:, start * RATE // FPS :][:, :length]
    assert torch.equal(fitted.audio.samples[:, : taken.shape[1]], taken)
