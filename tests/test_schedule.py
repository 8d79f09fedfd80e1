"""Timestep grids: inversion's always contains sampling's."""

import pytest

from cove.schedule import MAX_STEPS, Schedule


def test_schedule_of_fifty_steps_is_the_papers():
    assert Schedule(50).sampling == list(range(1, 982, 20))
    assert Schedule(50, 2).inversion == list(range(1, 982, 10))  # 99 of 100 steps


@pytest.mark.parametrize(
    ("steps", "last"), [(1, 1), (2, 501), (3, 667), (7, 858), (334, 998), (500, 999), (501, 999), (999, 999)]
)
def test_schedule_sampling_covers_the_whole_range(steps, last):
    """The last timestep is 1001 - 1000 / steps, rounded down."""
    grid = Schedule(steps).sampling
    assert len(grid) == steps and grid[0] == 1 and grid[-1] == last == 1 + 1000 * (steps - 1) // steps
    assert all(0 < after - before <= -(-1000 // steps) for before, after in zip(grid, grid[1:], strict=False))


def test_schedule_inversion_contains_every_sampling_step_and_ends_with_the_last():
    for steps in range(1, MAX_STEPS + 1):
        for multiple in (1, 2, 3, 7):
            if steps * multiple <= MAX_STEPS:
                schedule = Schedule(steps, multiple)
                assert schedule.inversion[::multiple] == schedule.sampling
                assert schedule.inversion[-1] == schedule.sampling[-1]
                assert len(schedule.inversion) == (steps - 1) * multiple + 1


@pytest.mark.parametrize(("steps", "multiple"), [(0, 1), (1, 0), (-3, 1), (1000, 1), (500, 2), (334, 3)])
def test_schedule_refuses_steps_out_of_range(steps, multiple):
    with pytest.raises(ValueError, match=f"at most 999 steps; got {steps} steps times {multiple}"):
        Schedule(steps, multiple)


@pytest.mark.parametrize(
    ("steps", "share", "count"),
    [(50, 0.8, 40), (20, 0.8, 16), (50, 0, 0), (7, 1, 7), (3, 0.8, 2), (3, 0.1, 1), (5, 0.5, 3), (7, 0.5, 4)],
)
def test_schedule_share_returns_the_number_of_steps(steps, share, count):
    assert Schedule(steps).share(share) == count
