"""Timesteps of sampling and of inversion: the second grid contains the first one by construction."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

TRAIN_TIMESTEPS = 1000
MAX_STEPS = TRAIN_TIMESTEPS - 1  # grids begin at timestep 1, and the last timestep is 999


@dataclass(frozen=True)
class Schedule:
    """Sampling in `steps` steps, and inversion in `multiple` times as many.

    The timesteps of n steps are 1 + floor(1000 i / n): 1, 21, ..., 981 for 50. A grid of n * m steps passes through all
    of them. COVE (arXiv 2406.08850), section 4.1, has 50 steps and a multiple of 2.

    Raises:
        ValueError: `steps` or `multiple` is below 1, or their product above 999.
    """

    steps: int = 50
    multiple: int = 1

    def __post_init__(self):
        if self.steps < 1 or self.multiple < 1 or self.steps * self.multiple > MAX_STEPS:
            raise ValueError(
                f"expected at least 1 step and a multiple of at least 1, together at most {MAX_STEPS} steps; got "
                f"{self.steps} steps times {self.multiple}"
            )

    @property
    def sampling(self) -> list[int]:
        """Timesteps of sampling, ascending, [steps]."""
        return _timesteps(self.steps)

    @property
    def inversion(self) -> list[int]:
        """Timesteps of inversion, ascending. They end where sampling starts: [(steps - 1) * multiple + 1]."""
        return _timesteps(self.steps * self.multiple)[: (self.steps - 1) * self.multiple + 1]

    def share(self, share: float) -> int:
        """Return how many sampling steps a share of them is, rounded half up, at least 1 unless it is 0: 40 of 50."""
        return max(1, floor(share * self.steps + 0.5)) if share > 0 else 0


def _timesteps(steps: int) -> list[int]:
    return [1 + TRAIN_TIMESTEPS * i // steps for i in range(steps)]
