"""Load Frames: a clip as images, with its sound."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.input_impl import VideoFromFile
from comfy_api.v0_0_2 import io
from comfy_execution.validation import validate_node_input

from ..cove import frames
from ..cove.audio import Audio
from ..cove.convert import FITS, MAX_SIZE
from ..cove.decode import is_animated_png, is_animated_webp
from . import host


def _side(name: str, default: int, other: str) -> io.Int.Input:
    tooltip = (
        f"{name.capitalize()} in pixels, a multiple of 8. A larger size shows more detail and takes much more time and "
        f"memory. 0 = computed from the {other}, keeping the aspect ratio; both 0 = the clip's own size, cropped to a "
        f"multiple of 8."
    )
    return io.Int.Input(name, default=default, min=0, max=MAX_SIZE, step=8, tooltip=tooltip)


class LoadFrames(io.ComfyNode):
    """Reads only the frames to load, at the size to load them; sizes are multiples of 8, as latents need."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveLoadFrames",
            display_name="COVE Load Frames",
            category="COVE/load",
            description=(
                "Loads frames of a video or an image folder from ComfyUI's input folder, as a player shows them, at a "
                "size that latents need, with the audio of the same span. Editing time grows faster than the number of "
                "frames: start with few."
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_choices(),
                    upload=io.UploadType.video,
                    tooltip="A video, GIF, animated PNG or WebP, or a folder of images (read in natural order) in "
                    "ComfyUI's input folder. Subfolders are listed one level deep.",
                ),
                io.Int.Input("start", default=0, min=0, max=1_000_000, tooltip="First frame to load, counted from 0."),
                io.Int.Input(
                    "count",
                    default=9,
                    min=0,
                    max=100_000,
                    tooltip="Number of frames to load. Time and memory grow faster than the number. 0 = to the end of "
                    "the clip.",
                ),
                io.Int.Input(
                    "stride",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Load every n-th frame; fps is divided by n. A larger value covers more time with the same "
                    "number of frames, with more motion between them.",
                ),
                _side("width", 512, "height"),
                _side("height", 0, "width"),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    tooltip="How to fit another aspect ratio. crop: fill the size and cut the edges. pad: keep "
                    "everything and add black bars. stretch: distort.",
                ),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="A video from another node. When connected, it is read instead of the file.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Float.Output(display_name="fps", tooltip="Frames per second after the stride, for Create Video."),
                io.Int.Output(display_name="frame count"),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="1 where the clip shows nothing: transparent pixels, and the bars of pad.",
                ),
                io.Audio.Output(
                    display_name="audio",
                    tooltip="Audio of the loaded span, for Create Video; empty if the clip has none.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None, input_types=None) -> bool | str:
        # A connected video is known by its type only, and ComfyUI leaves checking types to nodes that ask for them.
        for slot in cls.define_schema().inputs:
            connected = (input_types or {}).get(slot.id)
            if connected is not None and not validate_node_input(connected, slot.get_io_type()):
                return f"Load Frames: {connected} is connected to {slot.id}; expected {slot.get_io_type()}."
        return "video" in (input_types or {}) or host.files.check_name(file, cls, folders=True)

    @classmethod
    def fingerprint_inputs(cls, file=None, **others) -> str:
        return host.files.state_of(file, frames.image_files)

    @classmethod
    @host.errors.named
    def execute(cls, file, start, count, stride, width, height, fit, video=None) -> io.NodeOutput:
        progress = host.status.progress_bar()
        settings = {"start": start, "count": count, "stride": stride, "width": width, "height": height, "fit": fit}
        if video is None:
            clip = frames.read_frames(host.files.path_of(file, folders=True), **settings, progress=progress)
        else:
            clip = _read_video(video, settings, progress)
        for note in clip.notes:
            host.status.report_status(cls, note)
        audio = clip.audio and {"waveform": clip.audio.samples[None], "sample_rate": clip.audio.rate}
        return io.NodeOutput(clip.images, clip.fps, len(clip.images), clip.mask, audio)


def _read_video(video: Any, settings: dict[str, Any], progress: Callable[[int, int], None]) -> frames.Frames:
    """Read the frames of a VIDEO: from its file, where it has one, else from its components.

    Args:
        settings: start, count, stride, width, height and fit, as in `read_frames`.
    """
    if isinstance(video, VideoFromFile) and (trim := _trim(video)) is not None:
        begin, seconds = trim
        window = (begin, begin + seconds if seconds else inf) if begin or seconds else None
        source = video.get_stream_source()
        source = Path(source) if isinstance(source, str) else source
        return frames.read_frames(source, **settings, progress=progress, window=window)
    parts = video.get_components()
    images, audio = parts.images, parts.audio
    if getattr(parts, "alpha", None) is not None:
        images = torch.cat([images[..., :3], parts.alpha], dim=-1)
    audio = audio and Audio(audio["waveform"][0].float(), int(audio["sample_rate"]))
    return frames.fit_frames(images, float(parts.frame_rate), audio, **settings)


def _trim(video: VideoFromFile) -> tuple[float, float] | None:
    """Return where the VIDEO begins and how long it is, in seconds, 0 = to its end; None if the host does not say."""
    if hasattr(video, "get_active_trim_window"):
        return video.get_active_trim_window()
    return None if hasattr(video, "as_trimmed") else (0.0, 0.0)


def _choices() -> list[str]:
    """Videos of the input folder and of its subfolders, and the subfolders that hold images, one level deep."""
    root = folder_paths.get_input_directory()
    top = host.files.listed(root)
    folders = [name for name, is_folder in top if is_folder]
    entries = [top, *(host.files.listed(root, folder) for folder in folders)]
    files = [name for entry in entries for name, is_folder in entry if not is_folder]
    shown = {name.rpartition("/")[0] for name in files if name.lower().endswith(frames.IMAGE_SUFFIXES)}
    videos = {*folder_paths.filter_files_content_types(files, ["video"])}
    videos |= {name for name in files if name.lower().endswith(frames.CLIP_SUFFIXES)}
    # In a folder, PNG and WebP are the images of a clip; to look into each would take long.
    videos |= {name for name, is_folder in top if not is_folder and _is_animated(Path(root, name))}
    return sorted(videos) + sorted(shown - {""})


def _is_animated(path: Path) -> bool:
    looks = {".webp": is_animated_webp, ".png": is_animated_png}.get(path.suffix.lower())
    try:
        return looks is not None and path.is_file() and looks(path)
    except OSError:
        return False


NODES = [LoadFrames]
