"""Atomic file writes, and tensors that stay on disk."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Provide a temporary path beside `path`, which is renamed to it when the block ends without an error.

    A kill at any point leaves the old file or none under the name, an error leaves no temporary file either.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # a link of this name would lead the writer elsewhere
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write one safetensors file; OSError if that fails, instead of safetensors' own error."""
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def on_disk(tensors: Mapping[str, Tensor], folder: str | os.PathLike) -> dict[str, Tensor]:
    """Return copies of tensors that are mapped into memory from a file in `folder`.

    The file has lost its name by the time this returns and is gone with the tensors, even after a kill; on Windows,
    where a mapped file cannot lose its name, it stays until somebody clears the folder.
    """
    path = Path(folder) / f"{uuid.uuid4().hex}.safetensors"
    try:
        save_tensors(tensors, path)
        return load_file(path)
    finally:
        with suppress(OSError):
            path.unlink()
