"""Where the pack's own files are saved, and how they are found again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import folder_paths


def place_to_save(prefix: str, ending: str, node: str) -> Path:
    """A new numbered name in ComfyUI's output folder."""
    root = folder_paths.get_output_directory()
    if not Path(root, prefix).resolve().is_relative_to(Path(root).resolve()):
        raise ValueError(f'{node}: filename_prefix "{prefix}" leaves the output folder; name a place inside of it.')
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
    return Path(folder) / f"{name}_{counter:05}_{ending}"


def saved_files(ending: str) -> list[str]:
    """The files with this ending in ComfyUI's output and input folders, newest first, as the host annotates them."""
    found = []
    for kind in ("output", "input"):
        root = Path(folder_paths.get_directory_by_type(kind))
        for path in root.rglob(f"*{ending}"):
            with suppress(OSError):  # a link to nowhere, or a file that has gone meanwhile
                found.append((path.stat().st_mtime, path.relative_to(root).as_posix(), kind))
    return [f"{name} [{kind}]" for _, name, kind in sorted(found, reverse=True)]


def path_of(file: str) -> Path:
    """The path of one of `saved_files`."""
    return Path(folder_paths.get_annotated_filepath(file))


def is_there(file: str | None, node: str) -> bool | str:
    """For a node's validation: whether the file named can be loaded, else what to do."""
    if file is None or path_of(file).is_file():
        return True
    return f'{node}: there is no file "{file}". Press R to refresh the list, and choose another.'


@contextmanager
def saving(node: str) -> Iterator[None]:
    """Around what writes a file: an error of the disk names the node, and says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{node}: {error}. Make room, or choose another folder, and queue again.") from error


def check_space(folder: Path, size: int, node: str) -> None:
    """An error when `size` bytes do not fit."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"{node}: this takes {size / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free in {folder}. Make room."
        )


def state_of(file: str) -> str:
    """Changes when the file does."""
    try:
        state = path_of(file).stat()
    except OSError:
        return ""
    return hashlib.sha256(repr((file, state.st_mtime_ns, state.st_size)).encode()).hexdigest()
