"""Measure time and peak memory of reading a clip, compared with the ffmpeg program on the same clip.

    python -m benchmarks.reading_cost [--frames 300] [--size 1920x1080] [--width 512] [--repeats 5]

Needs `ffmpeg` on the path. It draws the clip, then decodes and resizes it to RGB and discards the result. Both results
are compared first. Runs alternate, each in its own process. Memory is the growth of the process and the size of the
frames.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.memory import working_memory
from cove.frames import read_frames
from evidence.tables.records import FOLDER, Records, machine


def draw(path: Path, frames: int, size: str) -> None:
    """Draw a moving test picture with noise, about as hard to decode as filmed video."""
    source = f"testsrc2=size={size}:rate=30,noise=alls=12:allf=t"
    encode = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-pix_fmt", "yuv420p", "-colorspace", "bt709"]
    encode += ["-frames:v", str(frames)]
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, *encode, path], check=True)


def ffmpeg(path: Path, width: int, height: int, *output: str) -> bytes:
    scale = f"scale={width}:{height}:flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    command = ["ffmpeg", "-v", "error", "-i", path, "-vf", scale, "-pix_fmt", "rgb24", "-f", "rawvideo", *output]
    return subprocess.run(command, check=True, capture_output=True).stdout


def run(path: Path, width: int) -> tuple[float, float, float]:
    """Return seconds, growth of the process in MiB, and size of the frames in MiB."""
    clip, seconds = None, 0.0

    def read() -> None:
        nonlocal clip, seconds
        start = time.perf_counter()
        clip = read_frames(path, width=width)
        seconds = time.perf_counter() - start

    grown = working_memory(read)
    return seconds, grown / 2**20, clip.images.numel() * clip.images.element_size() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--size", default="1920x1080")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clip", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.clip:
        print(*run(arguments.clip, arguments.width))
        return
    records = Records(FOLDER / "reading_cost.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        draw(path, arguments.frames, arguments.size)
        images = read_frames(path, count=5, width=arguments.width).images
        height, width = images.shape[1:3]
        reference = np.frombuffer(ffmpeg(path, width, height, "-frames:v", "5", "-"), np.uint8)
        difference = abs(images.numpy() * 255 - reference.reshape(images.shape)).mean()
        assert difference < 0.5, difference  # of 255
        case = {"frames": arguments.frames, "size": arguments.size, "width": arguments.width}
        runs = [case | {"run": run} for run in range(arguments.repeats)]
        for one in runs:
            start = time.perf_counter()
            ffmpeg(path, width, height, "-y", "/dev/null")
            theirs = time.perf_counter() - start
            command = [sys.executable, "-m", "benchmarks.reading_cost", f"--width={arguments.width}", f"--clip={path}"]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            ours, grown, kept = map(float, answer.split())
            records.add(one, {"ffmpeg": theirs, "seconds": ours, "MiB": grown, "frames MiB": kept})
    theirs, ours, grown, kept = (
        statistics.median(records[one][what] for one in runs) for what in ("ffmpeg", "seconds", "MiB", "frames MiB")
    )
    print(
        f"{machine()}, {arguments.frames} frames of {arguments.size} to {width}x{height}; median of "
        f"{arguments.repeats}\n"
        f"read_frames {ours:.1f} s, ffmpeg {theirs:.1f} s: {ours / theirs:.2f} times its time; mean difference "
        f"{difference:.2f} of 255; {grown:.0f} MiB for {kept:.0f} MiB of frames"
    )


if __name__ == "__main__":
    main()
