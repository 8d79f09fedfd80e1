"""How much memory something takes while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable


def working_memory(run: Callable[[], object]) -> int:
    """Bytes held at the worst moment of `run` beyond what was held before it: of the GPU, else of this process.

    Call it once in a process: what one call leaves to the allocator, the next does not ask the system for.
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
