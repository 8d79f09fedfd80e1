"""What a user sees while a node runs: its name, lines of text, progress, previews."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.utils
import latent_preview


def name_of(node) -> str:
    """Return a node's name in messages: its display name without the pack's, which is there for search."""
    return node.define_schema().display_name.removeprefix("COVE ")


def report_status(node, text: str, level: int = logging.INFO) -> None:
    """Show a line of text on a node in the page, while it runs, and in the log. `node` is its class."""
    logging.log(level, "%s: %s", name_of(node), text)
    module = sys.modules.get("server")  # absent when a script calls nodes without serving a page
    if module is not None and node.hidden is not None:
        module.PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


def progress_bar(total: int | None = None) -> Callable[[int, int], None]:
    """Return a function of (done, total) that shows progress on the node and raises when the user interrupts.

    Args:
        total: where several loops share one bar; otherwise that of the call.
    """
    bar = comfy.utils.ProgressBar(total or 1)

    def update(done: int, total_of_call: int) -> None:
        bar.total = total or total_of_call
        bar.update_absolute(done)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return update


def preview(model, steps: int) -> Callable:
    """Return a callback of a sampler: progress bar, latent preview, and a check for interruption."""
    show = latent_preview.prepare_callback(model, steps)

    def callback(*step) -> None:
        show(*step)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return callback


def format_bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def format_sigmas(sigmas: Sequence[float]) -> str:
    texts = [f"{sigma:.4g}" for sigma in sigmas]
    steps = "1 step" if len(texts) == 1 else f"{len(texts)} steps"
    return f"{steps}, sigma {', '.join(texts if len(texts) < 7 else [*texts[:3], '...', *texts[-2:]])}"
