"""Storage of the finished steps of an interrupted inversion."""

import math
import os
import shutil
import sys

import pytest
import torch

from tests.method_helpers import assert_same, full_disk, randn

STEPS = 11
LATENTS = (3, 2, 5, 7)  # frames, channels, height, width


def record(step):
    return {
        "x": randn(*LATENTS, seed=step),
        "residual": torch.tensor(math.nan if step == 1 else step / 7, dtype=torch.float64),
        "stopped": torch.tensor(step == 2),
    }


RECORDS = [record(step) for step in range(STEPS)]


@pytest.fixture
def module(host_module):
    """The pack's `nodes/host/unfinished.py`."""
    return sys.modules[f"{host_module.__name__}.unfinished"]


@pytest.fixture
def unfinished(module, tmp_path):
    made = module.UnfinishedInversion(tmp_path / "unfinished", "abc")
    for step, tensors in enumerate(RECORDS):
        made.add(step, tensors)
    return made


def files(unfinished):
    return sorted(unfinished.folder.iterdir())


def test_steps_returns_steps_in_order(module, unfinished, tmp_path):
    assert_same(unfinished.steps(), RECORDS)
    assert_same(module.UnfinishedInversion(str(tmp_path / "unfinished"), "abc").steps(), RECORDS)
    assert module.UnfinishedInversion(tmp_path / "unfinished", "abd").steps() == []
    assert len(files(unfinished)) == STEPS


def test_add_writes_a_step_immediately(module, tmp_path):
    made = module.UnfinishedInversion(tmp_path / "user" / "unfinished", "abc")
    assert made.steps() == []
    for step, tensors in enumerate(RECORDS):
        made.add(step, tensors)
        assert_same(made.steps(), RECORDS[: step + 1])


def test_add_keeps_tensors_of_any_strides(module, tmp_path):
    made = module.UnfinishedInversion(tmp_path, "abc")
    made.add(0, {"x": randn(7, 5, 3).permute(2, 1, 0)})
    assert_same(made.steps(), [{"x": randn(7, 5, 3).permute(2, 1, 0)}])


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b""), None])
@pytest.mark.parametrize("step", [0, 4, STEPS - 1])
def test_steps_ends_before_an_unreadable_step(unfinished, step, damage):
    path = files(unfinished)[step]
    if damage is None:
        os.truncate(path, path.stat().st_size - 1)
    else:
        damage(path)
    assert_same(unfinished.steps(), RECORDS[:step])
    unfinished.add(step, RECORDS[step])
    assert_same(unfinished.steps()[: step + 1], RECORDS[: step + 1])


def test_add_leaves_no_file_after_a_failed_write(module, unfinished, monkeypatch):
    before = files(unfinished)
    monkeypatch.setattr(sys.modules[module.save_tensors.__module__], "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        unfinished.add(STEPS, RECORDS[0])
    assert files(unfinished) == before
    assert_same(unfinished.steps(), RECORDS)


def test_steps_returns_tensors_that_outlive_their_files(unfinished):
    found = unfinished.steps()
    unfinished.discard()
    assert_same(found, RECORDS)


def test_discard_removes_this_inversion_only(module, unfinished):
    other = module.UnfinishedInversion(unfinished.folder.parent, "other")
    other.add(0, RECORDS[0])
    unfinished.discard()
    assert unfinished.steps() == [] and not unfinished.folder.exists()
    assert_same(other.steps(), RECORDS[:1])
    unfinished.discard()  # again, without an error


def unfinished_ones(module, folder, count, steps=2):
    """Yield inversions, oldest first, with explicit dates because a file system's clock may be too coarse."""
    for i in range(count):
        made = module.UnfinishedInversion(folder, f"{(7 * i) % 11:02}")  # names do not sort by age
        for step in range(steps):
            made.add(step, RECORDS[step])
        os.utime(made.folder, (1000 + i, 1000 + i))
        yield made


def taken(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), LATENTS, (11, 4, 13, 17)])
@pytest.mark.parametrize("steps", [1, 7])
def test_size_of_is_slightly_above_the_actual_size(module, tmp_path, shape, steps):
    made = module.UnfinishedInversion(tmp_path, "abc")
    for step in range(steps):
        made.add(step, record(step) | {"x": randn(*shape, seed=step)})
    assert taken(tmp_path) <= made.size_of(steps, shape) < taken(tmp_path) + 1024 * steps


def test_unfinished_in_lists_the_oldest_first_with_sizes(module, tmp_path):
    (tmp_path / "a file").write_text("not an unfinished inversion")
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    ones = list(unfinished_ones(module, tmp_path, 5))
    found = module.unfinished_in(tmp_path)
    assert list(found) == [one.folder for one in ones] and sum(found.values()) == taken(tmp_path) - len(
        "not an unfinished inversion"
    )
    assert ones[3].others() == sum(found.values()) - found[ones[3].folder]
    assert module.unfinished_in(tmp_path / "missing") == {}
    assert module.UnfinishedInversion(tmp_path / "missing", "a").others() == 0


@pytest.mark.parametrize("room", [0, 1, 3, 6])
def test_make_room_removes_the_oldest_until_the_rest_fits(module, tmp_path, monkeypatch, room):
    (tmp_path / "a file").write_text("not an unfinished inversion")
    ones = list(unfinished_ones(module, tmp_path, 7))
    one = ones[0].others() // 6  # all are of one size
    new = module.UnfinishedInversion(tmp_path, "new")
    monkeypatch.setattr(module.UnfinishedInversion, "LIMIT", 7 * one)
    assert new.make_room(room * one) is True
    assert [len(some.steps()) for some in ones] == [0] * room + [2] * (7 - room)
    # One byte more removes another one.
    assert new.make_room(room * one + 1) is True
    assert [len(some.steps()) for some in ones] == [0] * (room + 1) + [2] * (6 - room)
    assert (tmp_path / "a file").exists() and new.steps() == []


def test_make_room_keeps_its_own_steps(module, tmp_path, monkeypatch):
    ones = list(unfinished_ones(module, tmp_path, 3))
    one = ones[0].others() // 2
    monkeypatch.setattr(module.UnfinishedInversion, "LIMIT", 3 * one)
    assert ones[0].make_room(2 * one) is True  # it is the oldest
    assert [len(some.steps()) for some in ones] == [2, 0, 2]


def test_make_room_refuses_an_inversion_that_alone_exceeds_the_limit(module, tmp_path, monkeypatch):
    ones = list(unfinished_ones(module, tmp_path, 5))
    one = ones[0].others() // 4
    monkeypatch.setattr(module.UnfinishedInversion, "LIMIT", 3 * one)
    assert ones[4].make_room(3 * one + 1) is False
    assert [len(some.steps()) for some in ones] == [0, 2, 2, 2, 0]  # others are removed down to the limit only


def test_make_room_returns_false_when_others_cannot_be_removed(module, tmp_path, monkeypatch):
    ones = list(unfinished_ones(module, tmp_path, 3))
    monkeypatch.setattr(module.UnfinishedInversion, "LIMIT", ones[0].others())
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    assert module.UnfinishedInversion(tmp_path, "new").make_room(1) is False


def test_add_never_exceeds_the_limit(module, tmp_path, monkeypatch):
    """Two processes may write to one folder without knowing how many steps the other will add."""
    limit = module.UnfinishedInversion.size_of(5, LATENTS)
    monkeypatch.setattr(module.UnfinishedInversion, "LIMIT", limit)
    one, other = (module.UnfinishedInversion(tmp_path, name) for name in ("one", "other"))
    assert one.make_room(one.size_of(5, LATENTS)) and other.make_room(other.size_of(5, LATENTS))
    refused = 0
    for step in range(5):
        for made in (one, other):
            try:
                made.add(step, RECORDS[step])
            except OSError:
                refused += 1
            assert taken(tmp_path) <= limit
    assert refused and len(one.steps()) + len(other.steps()) + refused == 10
    assert_same(one.steps(), RECORDS[: len(one.steps())])


def test_add_refuses_a_step_without_its_predecessor(module, tmp_path):
    made = module.UnfinishedInversion(tmp_path, "abc")
    made.add(0, RECORDS[0])
    with pytest.raises(OSError, match="step before"):
        made.add(2, RECORDS[2])
    made.discard()
    with pytest.raises(OSError, match="step before"):
        made.add(1, RECORDS[1])
    assert not made.folder.exists()
