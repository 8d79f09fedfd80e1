"""Shared by the tests of file names: names inside and outside ComfyUI's folders, and files to load."""

import ctypes
import os
import sys
import time
from contextlib import contextmanager

import torch
from PIL import Image

from cove.correspondence import Correspondence
from cove.encode import write_frames

FRAMES, HEIGHT, WIDTH = 3, 24, 40  # of the clip, in pixels
INVERSION, CORRESPONDENCE = "a.inversion.safetensors", "a.correspondence.safetensors"
LOADERS = {"LoadFrames": "clip.mp4", "LoadInversion": INVERSION, "LoadCorrespondence": CORRESPONDENCE}

# Names that lead out of ComfyUI's folders. {out}: a folder outside, {up}: its path from the input folder, {file}: a
# file in it. In the input folder, `link` points to the folder outside, `link_file` to the file, `gone` to nothing.
NAMES = [
    "{out}/{file}",
    "/{out}/{file}",
    "{out}/{file} [input]",
    "{out}/{file} [output]",
    "{out}/{file} [temp]",
    "{out}/{file}[output]",
    "{out}",
    "{up}/{file}",
    "{up}/{file} [input]",
    "./{up}/{file}",
    "sub/../{up}/{file}",
    "sub/../../input/{up}/{file}",
    "missing/../{up}/{file}",
    "{up}",
    "..",
    "../input/{file}",
    "../output/{file} [input]",
    "sub/..",
    "sub\\..\\..\\outside\\{file}",
    "..\\..\\outside\\{file}",
    "link/{file}",
    "link/missing.mp4",
    "link/sub/../{file}",
    "link",
    "sub/link/{file}",
    "link_file",
    "gone",
    "C:\\{file}",
    "C:{file}",
    "c:/{file} [output]",
    "\\{file}",
    "\\\\server\\share\\{file}",
    "//server/share/{file}",
    "\\\\?\\C:\\{file}",
    "\\\\.\\pipe\\{file}",
    "a\0{file}",
    "{out}/{file}\0.png",
    "",
    " [output]",
    ".",
    "./",
    "/",
    "/dev/zero",
    "/etc/hostname [output]",
    "/proc/self/environ",
    "\ud800.mp4",
]
# Names inside the folders of files that cannot be loaded.
MISSING = [
    "missing.mp4",
    "x" * 300 + ".mp4",
    "sub/" * 1500 + "x.mp4",
    "~/{file}",
    "file://{out}/{file}",
    "http://127.0.0.1/{file}",
    "concat:{file}|{file}",
    "{file}/{file}",
    "loop",
    "pipe",
    "...",
    "%2e%2e/outside/{file}",
    "\uff0e\uff0e/outside/{file}",
    "sub/\n",
]
# Values that the API can send instead of a name.
NO_NAMES = [5, True, ["clip.mp4"], {"file": "clip.mp4"}, 0.5]
PREFIXES = ["{out}/a", "../outside/a", "sub/../../../outside/a", "..\\..\\outside\\a", "link/a", "link/deep/a", "C:\\a"]
PREFIXES += ["C:a", "\\\\server\\share\\a", "//server/share/a", "a\0b", "", ".", "/", "{year}/a", "%year%/a", "link\\a"]
PREFIXES += ["%year%/deep/a", "\ud800"]


@contextmanager
def opened(*folders):
    """Watch what any process opens in these folders, including the folders themselves (Linux)."""
    if sys.platform != "linux":
        yield lambda: b""
        return
    libc = ctypes.CDLL(None, use_errno=True)
    events = libc.inotify_init1(os.O_NONBLOCK)
    for folder in folders:
        assert libc.inotify_add_watch(events, os.fsencode(folder), 0x20) >= 0  # IN_OPEN

    def seen() -> bytes:
        try:
            return os.read(events, 2**16)
        except BlockingIOError:
            return b""

    try:
        yield seen
    finally:
        os.close(events)


def clip():
    return torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))


def matches():
    found = torch.arange(35).repeat(2, 1)[..., None].int()
    return Correspondence(found, found.clone(), 5, 7, 3)


def fill(folder, inversion=None):
    """Write a file for each loader, and a folder of images."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    write_frames(folder / "clip.mp4", clip(), 12)
    write_frames(folder / "sub" / "clip.mp4", clip(), 12)
    matches().save(folder / CORRESPONDENCE)
    if inversion is not None:
        inversion.save(folder / INVERSION)
    write_images(folder / "images")


def write_images(folder):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(clip()):
        Image.fromarray((image * 255).byte().numpy()).save(folder / f"{number}.png")


def link_out(folder, outside):
    """Create links in a folder that lead out of it."""
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "link").symlink_to(outside, target_is_directory=True)
    (folder / "sub" / "link").symlink_to(outside, target_is_directory=True)
    (folder / "link_file").symlink_to(outside / "clip.mp4")
    (folder / "gone").symlink_to(outside / "missing")


def spelled(name, folders, file="clip.mp4"):
    up = os.path.relpath(folders.outside, folders.input)
    return name.format(out=folders.outside, up=up, file=file, year=time.localtime().tm_year)
