"""Records of measurements, one per line of a file, so that an interrupted run resumes where it stopped."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".evidence"


class Records:
    """Measured values by case (a dict of plain values). Several processes can append to one file."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.found = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # incomplete line of a killed process; the case is measured again
            self.found[_key(record["case"])] = record

    def __contains__(self, case: dict) -> bool:
        return _key(case) in self.found

    def __getitem__(self, case: dict) -> dict:
        return self.found[_key(case)]["measured"]

    def add(self, case: dict, measured: dict) -> None:
        line = {"case": case, "measured": measured, "on": machine()}
        self.found[_key(case)] = line
        with self.path.open("ab", buffering=0) as file:  # a single write, because other processes append as well
            file.write(f"\n{json.dumps(line)}\n".encode())

    def __iter__(self) -> Iterator[tuple[dict, dict]]:
        """Yield (case, measured) in the order of the file."""
        return ((line["case"], line["measured"]) for line in self.found.values())

    def machines(self) -> set[str]:
        return {line["on"] for line in self.found.values()}


def add_part(parser: argparse.ArgumentParser) -> None:
    """Add the option --part, which splits the cases of a run among processes."""
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="every N-th case, from the I-th")


def _part(text: str) -> tuple[int, int]:
    part, parts = map(int, text.split("/"))
    return part, parts


def machine() -> str:
    """Return the device and the version of torch, for the tables."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU ({platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores)"
    return f"{device}, torch {torch.__version__.split('+')[0]}"


def _key(case: dict) -> str:
    return json.dumps(case, sort_keys=True)
