"""An inversion that was broken off keeps its finished steps, and can be taken up again."""

import math
import os

import pytest
import torch

import cove.files
from cove.inversion import UnfinishedInversion
from tests.method_helpers import assert_same, full_disk, randn

STEPS = 11
LATENTS = (3, 2, 5, 7)  # frames, channels, height, width


def record(step):
    return {
        "x": randn(*LATENTS, seed=step),
        "guess": randn(*LATENTS, seed=step + 100),
        "residual": torch.tensor(math.nan if step == 1 else step / 7, dtype=torch.float64),
        "grew": torch.tensor(step == 2),
    }


RECORDS = [record(step) for step in range(STEPS)]


@pytest.fixture
def unfinished(tmp_path):
    made = UnfinishedInversion(tmp_path / "unfinished", "abc")
    for step, tensors in enumerate(RECORDS):
        made.add(step, tensors)
    return made


def files(unfinished):
    return sorted(unfinished.folder.iterdir())


def test_steps_come_back_in_order(unfinished, tmp_path):
    assert_same(unfinished.steps(), RECORDS)
    assert_same(UnfinishedInversion(str(tmp_path / "unfinished"), "abc").steps(), RECORDS)
    assert UnfinishedInversion(tmp_path / "unfinished", "abd").steps() == []
    assert len(files(unfinished)) == STEPS


def test_a_step_is_kept_as_soon_as_it_is_added(tmp_path):
    made = UnfinishedInversion(tmp_path / "user" / "unfinished", "abc")
    assert made.steps() == []
    for step, tensors in enumerate(RECORDS):
        made.add(step, tensors)
        assert_same(made.steps(), RECORDS[: step + 1])


def test_steps_are_kept_whatever_their_strides(tmp_path):
    made = UnfinishedInversion(tmp_path, "abc")
    made.add(0, {"x": randn(7, 5, 3).permute(2, 1, 0)})
    assert_same(made.steps(), [{"x": randn(7, 5, 3).permute(2, 1, 0)}])


def test_a_step_that_ends_with_its_guess_is_kept(tmp_path):
    """Where refining made the residual grow, `cove.ddim.invert` ends with the guess: one tensor, under two names."""
    made = UnfinishedInversion(tmp_path, "abc")
    x = randn(*LATENTS)
    made.add(0, {"x": x, "guess": x})
    assert_same(made.steps(), [{"x": x, "guess": x}])


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b""), None])
@pytest.mark.parametrize("step", [0, 4, STEPS - 1])
def test_a_step_that_cannot_be_read_ends_them(unfinished, step, damage):
    path = files(unfinished)[step]
    if damage is None:
        os.truncate(path, path.stat().st_size - 1)
    else:
        damage(path)
    assert_same(unfinished.steps(), RECORDS[:step])
    unfinished.add(step, RECORDS[step])
    assert_same(unfinished.steps()[: step + 1], RECORDS[: step + 1])


def test_a_step_that_could_not_be_written_is_not_there(unfinished, monkeypatch):
    before = files(unfinished)
    monkeypatch.setattr(cove.files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        unfinished.add(STEPS, RECORDS[0])
    assert files(unfinished) == before
    assert_same(unfinished.steps(), RECORDS)


def test_steps_outlive_their_files(unfinished):
    found = unfinished.steps()
    unfinished.discard()
    assert_same(found, RECORDS)


def test_discard_forgets_this_one_only(unfinished):
    other = UnfinishedInversion(unfinished.folder.parent, "other")
    other.add(0, RECORDS[0])
    unfinished.discard()
    assert unfinished.steps() == [] and not unfinished.folder.exists()
    assert_same(other.steps(), RECORDS[:1])
    unfinished.discard()  # nothing there any more


def unfinished_ones(folder, count):
    """Begun one after the other; the clock of a file system may be too coarse to tell."""
    for i in range(count):
        made = UnfinishedInversion(folder, f"{(7 * i) % 11:02}")  # names of another order
        made.add(0, RECORDS[0])
        made.add(1, RECORDS[1])
        os.utime(made.folder, (1000 + i, 1000 + i))
        yield made


def test_only_the_latest_are_kept(tmp_path):
    assert UnfinishedInversion.KEPT == 4
    (tmp_path / "a file").write_text("is no unfinished inversion")
    os.utime(tmp_path / "a file", (9000, 9000))  # the latest of all
    ones = []
    for one in unfinished_ones(tmp_path, 7):
        ones.append(one)
        assert [len(one.steps()) for one in ones] == [0] * (len(ones) - 4) + [2] * min(len(ones), 4)
    assert (tmp_path / "a file").exists()


def test_only_beginning_one_forgets_others(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedInversion, "KEPT", 8)
        ones = list(unfinished_ones(tmp_path, 7))
    ones[2].add(2, RECORDS[2])
    assert [len(one.steps()) for one in ones] == [2, 2, 3, 2, 2, 2, 2]
    os.utime(ones[2].folder, (1002, 1002))
    ones[0].add(0, RECORDS[0])  # the oldest, begun again: it stays, with the latest three
    assert [len(one.steps()) for one in ones] == [2, 0, 0, 0, 2, 2, 2]
