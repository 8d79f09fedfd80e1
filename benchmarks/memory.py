"""Measure the peak memory of a call."""

from __future__ import annotations

import threading
from collections.abc import Callable


def working_memory(run: Callable[[], object]) -> int:
    """Return the increase in memory of `run` in bytes, at its peak: of the GPU, or without one of this process.

    Call it once per process: a second call reuses memory that the allocator kept from the first.
    """
    import psutil
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    process, done, peak = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    before, watcher = process.memory_info().rss, threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak - before
