"""With all packs of `COVE_PACKS` in a real server: bit-identical edits; VideoHelperSuite loads and writes the clip."""

import shutil
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from scripts.clip import render_clip
from scripts.host import Server, lay_out
from tests.beside.packs import install
from tests.workflows.helpers import SMALL, api_form

RATE, SKIPPED, FRAMES = 12, 3, 5
WIDTH, HEIGHT = 128, 80
PITCH = 1000  # Hz of the audio of the selected frames; before them, half


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A clip of 11 frames with audio whose pitch changes after the first three frames."""
    silent = render_clip(tmp_path_factory.mktemp("clip") / "silent.mp4", 11, WIDTH, HEIGHT, RATE)
    path, rate = silent.with_name("clip.mp4"), 24000
    time = np.arange(11 * rate // RATE) / rate
    wave = 0.5 * np.sin(2 * np.pi * time * np.where(time < SKIPPED / RATE, PITCH / 2, PITCH))
    with av.open(str(silent)) as source, av.open(str(path), "w") as target:
        video, audio = target.add_stream_from_template(source.streams.video[0]), target.add_stream("aac", rate=rate)
        audio.layout = "mono"
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = video
                target.mux(packet)
        sound = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
        sound.rate = rate
        target.mux(audio.encode(sound))
        target.mux(audio.encode())
    return path


def served(host, models, folders, base, clip):
    """Return a server in its own base folder, with the random checkpoint, the clip and these packs."""
    lay_out(base)
    shutil.copy(models, base / "models/checkpoints")
    shutil.copy(clip, base / "input")
    install(folders, base)
    return Server(host, base, "--cpu", python=sys.executable)  # this Python has the packs' requirements


@pytest.fixture(scope="module")
def beside(host, base, models, folders, clip, tmp_path_factory):
    checkpoint = base / "models/checkpoints" / models["sd15"]
    with served(host, checkpoint, folders, tmp_path_factory.mktemp("beside"), clip) as server:
        yield server


def edit(steps=4):
    """Return the first workflow on a few frames, with `noise` and `edited` that save latents, and its node ids."""
    prompt = api_form("1_edit_a_clip")
    for node in prompt.values():
        node["inputs"] |= SMALL.get(node["class_type"], {})
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    ids = {node["class_type"]: name for name, node in prompt.items()}
    prompt[ids["CoveLoadFrames"]]["inputs"] |= {"start": SKIPPED, "count": FRAMES, "width": WIDTH, "height": HEIGHT}
    for name, node in (("noise", "CoveDDIMInversion"), ("edited", "CoveDDIMSampler")):
        inputs = {"samples": [ids[node], 0], "filename_prefix": name}
        prompt[name] = {"class_type": "SaveLatent", "inputs": inputs}
    return prompt, ids


def test_server_edits_are_bit_identical_with_other_packs_installed(host, base, models, folders, clip, beside, tmp_path):
    prompt, _ = edit()
    checkpoint = base / "models/checkpoints" / models["sd15"]
    with served(host, checkpoint, {}, tmp_path, clip) as alone:
        outputs = [(server, server.queue(prompt)) for server in (alone, beside)]
    assert "CoveDDIMSampler" in beside.object_info()
    for name in ("noise", "edited"):
        one, other = (load_file(server.path_of(found[name]["latents"][0])) for server, found in outputs)
        assert torch.equal(one["latent_tensor"], other["latent_tensor"])


def test_server_loads_every_pack(beside, folders):
    """The server reports the folder of `custom_nodes` of every node."""
    modules = {node["python_module"] for node in beside.object_info().values()}
    assert {f"custom_nodes.{name}" for name in folders} <= modules, beside.log_tail()


def test_server_edits_a_clip_loaded_and_saved_by_videohelpersuite(beside, folders):
    if "comfyui-videohelpersuite" not in folders:
        pytest.skip("not run, comfyui-videohelpersuite was not given")
    prompt, ids = edit()
    load, save = prompt[ids["CoveLoadFrames"]], prompt[ids["SaveVideo"]]
    load["class_type"] = "VHS_LoadVideo"
    load["inputs"] = {"video": "clip.mp4", "force_rate": 0, "custom_width": 0, "custom_height": 0, "format": "None"}
    load["inputs"] |= {"frame_load_cap": FRAMES, "skip_first_frames": SKIPPED, "select_every_nth": 1}
    images = [ids["VAEDecode"], 0]
    del prompt[ids["CreateVideo"]]
    save["class_type"] = "VHS_VideoCombine"
    save["inputs"] = {"images": images, "audio": [ids["CoveLoadFrames"], 2], "frame_rate": RATE, "loop_count": 0}
    save["inputs"] |= {"filename_prefix": "edit", "format": "video/h264-mp4", "pingpong": False, "save_output": True}
    save["inputs"] |= {"pix_fmt": "yuv420p", "crf": 5}
    prompt["pictures"] = {"class_type": "SaveImage", "inputs": {"images": images, "filename_prefix": "edit"}}
    outputs = beside.queue(prompt)

    (file,) = outputs[ids["SaveVideo"]]["gifs"]
    with av.open(str(beside.path_of(file))) as video:
        assert video.streams.video[0].average_rate == RATE
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    pictures = [np.asarray(Image.open(beside.path_of(entry)).convert("RGB")) for entry in outputs["pictures"]["images"]]
    assert len(frames) == len(pictures) == FRAMES
    assert np.abs(np.stack(frames).astype(float) - np.stack(pictures)).mean() < 4
    with av.open(str(beside.path_of(file))) as video:
        stream = video.streams.audio[0]
        sound = np.concatenate([frame.to_ndarray()[0] for frame in video.decode(audio=0)])
    assert len(sound) / stream.rate == pytest.approx(FRAMES / RATE, abs=0.1)
    pitches = np.fft.rfftfreq(len(sound), 1 / stream.rate)
    assert pitches[np.abs(np.fft.rfft(sound)).argmax()] == pytest.approx(PITCH, rel=0.02)
