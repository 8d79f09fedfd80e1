"""One short name for the content of many things: what was inverted, with which model, how."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def fingerprint(*things: Any, known: Callable[[Any], Any] | None = None) -> str:
    """SHA-256 of tensors, numbers, strings, None, and sequences, mappings and dataclasses of them, as hexadecimal.

    Equal content gives equal fingerprints, in another process, too.

    Args:
        known: gives something of these kinds in place of anything else. Without it, TypeError: leaving a thing out
            would call different things the same.
    """
    digest = hashlib.sha256()
    _feed(digest, things, known)
    return digest.hexdigest()


def _feed(digest, thing: Any, known: Callable[[Any], Any] | None) -> None:
    if isinstance(thing, Tensor):
        digest.update(f"tensor {thing.dtype} {list(thing.shape)} ".encode())
        digest.update(thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(thing, dict):
        digest.update(f"mapping {len(thing)} ".encode())
        for key in sorted(thing, key=repr):
            _feed(digest, key, known)
            _feed(digest, thing[key], known)
    elif isinstance(thing, list | tuple):
        digest.update(f"sequence {len(thing)} ".encode())
        for item in thing:
            _feed(digest, item, known)
    elif is_dataclass(thing) and not isinstance(thing, type):
        content = {field.name: getattr(thing, field.name) for field in fields(thing)}
        _feed(digest, (type(thing).__qualname__, content), known)
    elif thing is None or isinstance(thing, bool | int | float | str | bytes):
        text = repr(thing)
        digest.update(f"{type(thing).__name__} {len(text)} {text} ".encode())
    elif known is not None:
        _feed(digest, known(thing), known)
    else:
        raise TypeError(f"the content of a {type(thing).__module__}.{type(thing).__qualname__} is not known")
