"""Content hash of nested values and tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def fingerprint(*things: Any, known: Callable[[Any], Any] | None = None) -> str:
    """Return the SHA-256 of tensors, numbers, strings, None, and sequences, mappings and dataclasses of them, as hex.

    Equal content gives equal fingerprints, in another process, too.

    Args:
        known: gives something of these kinds in place of anything else, and of what has attributes beside its content;
            it may hold more such things, and itself. Without it, TypeError: leaving a thing out would call different
            things the same.
    """
    return _Reader(known).digest(things)


class _Reader:
    def __init__(self, known: Callable[[Any], Any] | None):
        self.known = known
        self.path: list[int] = []  # ids of what is being read, from the outside in
        self.read: dict[int, tuple[Any, str]] = {}  # by id: what was read, kept alive so that the id stays its own

    def digest(self, thing: Any) -> str:
        digest = hashlib.sha256()
        self.feed(digest, thing)
        return digest.hexdigest()

    def feed(self, digest, thing: Any) -> None:
        if isinstance(thing, Tensor):
            digest.update(f"tensor {thing.dtype} {list(thing.shape)} ".encode())
            digest.update(thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif thing is None or isinstance(thing, bool | int | float | str | bytes):
            text = repr(thing)
            digest.update(f"{type(thing).__name__} {len(text)} {text} ".encode())
        elif id(thing) in self.path:
            digest.update(f"holds itself, {len(self.path) - self.path.index(id(thing))} out ".encode())
        else:
            self.path.append(id(thing))
            self.feed_content(digest, thing)
            self.path.pop()

    def feed_content(self, digest, thing: Any) -> None:
        more = self.known is not None and not _is_all_content(thing)
        if isinstance(thing, dict) and not more:
            digest.update(f"mapping {len(thing)} ".encode())
            for key in sorted(thing, key=self.order):
                self.feed(digest, key)
                self.feed(digest, thing[key])
        elif isinstance(thing, list | tuple) and not more:
            digest.update(f"sequence {len(thing)} ".encode())
            for item in thing:
                self.feed(digest, item)
        elif is_dataclass(thing) and not isinstance(thing, type) and not more:
            content = {field.name: getattr(thing, field.name) for field in fields(thing)}
            self.feed(digest, (type(thing).__qualname__, content))
        elif self.known is not None:
            if id(thing) not in self.read:
                self.read[id(thing)] = thing, self.digest(self.known(thing))
            digest.update(f"known {self.read[id(thing)][1]} ".encode())
        else:
            raise TypeError(f"the content of a {type(thing).__module__}.{type(thing).__qualname__} is not known")

    def order(self, key: Any) -> str:
        """Sorts the keys of a mapping in the same way in every process, where the text of an object has an address."""
        plain = isinstance(key, bool | int | float | str | bytes | tuple) or key is None
        return repr(key) if plain or self.known is None else self.digest(key)


def _is_all_content(thing: Any) -> bool:
    """Return whether a container has no attributes beside its items."""
    named = {field.name for field in fields(thing)} if is_dataclass(thing) and not isinstance(thing, type) else set()
    return getattr(thing, "__dict__", {}).keys() <= named
