"""How errors begin with the name of the node that the user has to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

from .status import name_of

# What a user can mend. Interruptions and lack of memory pass as they are.
ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


class NodeError(ValueError):
    """An error whose text begins with the name of a node."""

    def __init__(self, node, text: object):
        """node: a node's class, or a name."""
        super().__init__(f"{node if isinstance(node, str) else name_of(node)}: {text}")


@contextmanager
def naming(node) -> Iterator[None]:
    """Turn errors within into a NodeError of this node, if they name none yet."""
    try:
        yield
    except NodeError:
        raise
    except ERRORS as error:
        raise NodeError(node, error) from error


def named(execute: Callable) -> Callable:
    """Decorate a node's `execute`, below `classmethod`, so that errors within name the node."""

    @wraps(execute)
    def wrapper(cls, *args, **kwargs):
        with naming(cls):
            return execute(cls, *args, **kwargs)

    return wrapper
