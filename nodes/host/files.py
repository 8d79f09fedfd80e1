"""Files that a user, or a client of the API, names: read and written inside ComfyUI's folders only."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath

import folder_paths
from comfy_api.v0_0_2 import io

from .errors import NodeError
from .status import format_bytes, report_status

KINDS = ("input", "output", "temp")  # the host's folders, as it annotates names: "clip.mp4 [output]"
SUBFOLDER = "cove"  # of `filename_prefix`, by default


# --- inputs ---


def prefix_input(loader: str) -> io.String.Input:
    """Return the input for the name of a file to save, which the node `loader` lists."""
    tooltip = (
        f"Subfolder and start of the file name in the output folder; a number is appended. {loader} lists the output "
        f"folder and its subfolder `{SUBFOLDER}`."
    )
    return io.String.Input("filename_prefix", default=f"{SUBFOLDER}/clip", tooltip=tooltip)


def saved_input(what: str) -> io.Combo.Input:
    """Return the input for a file of `save`."""
    tooltip = (
        f"A saved {what}, newest first. Lists the output and input folders and the subfolder `{SUBFOLDER}` of each."
    )
    return io.Combo.Input("file", options=list_saved(_ending(what)), tooltip=tooltip)


def _ending(what: str) -> str:
    return f".{what}.safetensors"


# --- containment ---


def _stays_inside(name: str) -> bool:
    """Return whether the spelling of a relative name stays in its folder, on every system by Windows' rules."""
    spelled = PureWindowsPath(name)
    return bool(spelled.parts) and not spelled.anchor and ".." not in spelled.parts and "\0" not in name


def _resolve(root: str, *parts: str) -> Path | None:
    """Return the path with every link resolved; None if it leads out of `root` or is no name on this system."""
    try:
        path = Path(os.path.realpath(os.path.join(root, *parts)))
    except (OSError, ValueError):
        return None
    return path if path.is_relative_to(os.path.realpath(root)) else None


# --- reading ---


def path_of(name: str | None, folders: bool = False) -> Path:
    """Return the path of the file that a node's input names, with links resolved.

    Names are relative to the input folder, or to the folder in the host's annotation.

    Args:
        name: as a client of the API sent it.
        folders: also accept a folder. It must hold no link that leads out.

    Raises:
        ValueError: the name leads out of its folder, with one message whatever is there; or nothing has that name.
    """
    what = "file or folder" if folders else "file"
    if not isinstance(name, str):
        raise ValueError(f"expected the name of a {what} in ComfyUI's input folder, got {name!r:.200}.")
    bare, _ = folder_paths.annotated_filepath(name)
    kind = next((kind for kind in KINDS if name.endswith(f"[{kind}]")), KINDS[0])
    root = folder_paths.get_directory_by_type(kind)

    def contained(bare: str) -> Path:
        path = _resolve(root, bare) if _stays_inside(bare) else None
        if path is None:
            raise ValueError(
                f"{bare!r:.200} does not name a {what} inside ComfyUI's {kind} folder. Absolute paths, drive "
                f'letters, ".." and links that lead out of the folder are refused. Copy the {what} into it, or start '
                f"ComfyUI with --{kind}-directory."
            )
        return path

    path = contained(bare)
    if folders and os.path.isdir(path):
        try:
            with os.scandir(path) as entries:
                links = [entry.name for entry in entries if entry.is_symlink()]
        except OSError as error:
            raise ValueError(
                f"the folder {name!r:.200} cannot be read ({error.strerror}). Change its permissions, or "
                f"choose another."
            ) from error
        for link in links:
            contained(f"{bare}/{link}")
    elif not os.path.isfile(path):
        raise ValueError(
            f"there is no {what} {name!r:.200} in ComfyUI's {kind} folder. Press R to refresh the list and "
            f"choose another, or put it there."
        )
    return path


def check_name(name: str | None, node, folders: bool = False) -> bool | str:
    """Return for a node's validation True if `path_of` finds the file or the name is not known yet, else its error."""
    if name is None:
        return True
    try:
        path_of(name, folders)
    except ValueError as error:
        return str(NodeError(node, error))
    return True


def state_of(name: str | None, files_in: Callable[[Path], Iterable[Path]] | None = None) -> str:
    """Return a digest that changes when the file does, or one of the files in the folder; "" when there is none.

    Args:
        files_in: the files that count in a folder; without it, a folder is refused.
    """
    try:
        path = path_of(name, files_in is not None)
        files = files_in(path) if files_in and path.is_dir() else [path]
        stats = [(str(file), file.stat()) for file in files]
    except (OSError, ValueError):  # `execute` says what is wrong
        return ""
    return hashlib.sha256(repr([(file, stat.st_mtime_ns, stat.st_size) for file, stat in stats]).encode()).hexdigest()


def listed(root: str, folder: str = "", ending: str = "") -> list[tuple[str, bool]]:
    """List a folder of `root`: names relative to `root`, and whether each is a folder.

    Hidden entries are left out, and links that lead nowhere or out of `root`. A folder that cannot be read is empty,
    because the page needs its lists to load.
    """
    found = []
    if _resolve(root, folder) is None:
        return found
    with suppress(OSError), os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if entry.name[0] == "." or not entry.name.endswith(ending):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if not entry.is_symlink():
                found.append((name, entry.is_dir()))
            elif _resolve(root, name) is not None and os.path.exists(entry):
                found.append((name, os.path.isdir(entry)))
    return found


def list_saved(ending: str) -> list[str]:
    """List files with this ending, newest first, as the host annotates them.

    Looks directly in the output and input folders and in the subfolder `cove` of each, and nowhere else: the list is
    made at every page load and every queue.
    """
    found = []
    for kind in ("output", "input"):
        root = folder_paths.get_directory_by_type(kind)
        for name, is_folder in [*listed(root, "", ending), *listed(root, SUBFOLDER, ending)]:
            if not is_folder:
                with suppress(OSError):  # a file that has gone meanwhile
                    found.append((os.stat(os.path.join(root, name)).st_mtime, name, kind))
    return [f"{name} [{kind}]" for _, name, kind in sorted(found, reverse=True)]


# --- writing ---


def output_path(prefix: str, ending: str) -> Path:
    """Return a new numbered name in ComfyUI's output folder, and make its folder."""
    root = folder_paths.get_output_directory()
    if _stays_inside(prefix):
        parts = list(PureWindowsPath(prefix).parts)
        with saving():
            # The host fills in %year% and its like, but makes folders as well, wherever a link leads: one part at a
            # time makes none.
            parts = [folder_paths.get_save_image_path(part, root)[1] if "%" in part else part for part in parts]
            if _resolve(root, *parts[:-1], parts[-1] + ending) is not None:
                folder, name, counter, _, _ = folder_paths.get_save_image_path("/".join(parts), root)
                return Path(folder) / f"{name}_{counter:05}_{ending}"
    raise ValueError(
        f"filename_prefix {prefix!r:.200} does not name a file inside ComfyUI's output folder. Absolute paths, "
        f'drive letters, ".." and links that lead out of the folder are refused. Choose a prefix such as '
        f'"{SUBFOLDER}/clip", or start ComfyUI with --output-directory.'
    )


def save(content, what: str, prefix: str, node) -> None:
    """Save a Correspondence or an Inversion under a new name, and show on the node where.

    Args:
        what: "correspondence" or "inversion", for the ending of the name.

    Raises:
        ValueError: `prefix` leads out of the output folder, or the disk has no room.
    """
    path = output_path(prefix, _ending(what))
    free = shutil.disk_usage(path.parent).free
    if content.bytes > free:
        raise ValueError(
            f"the file takes {format_bytes(content.bytes)}, but {format_bytes(free)} are free in {path.parent}. Make "
            f"room on the disk."
        )
    with saving():
        content.save(path)
    report_status(node, f"saved as {path.name}, {format_bytes(path.stat().st_size)}")


@contextmanager
def saving() -> Iterator[None]:
    """Add what to do to errors of the disk within."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{error}. Make room, or choose another folder, and queue again.") from error
