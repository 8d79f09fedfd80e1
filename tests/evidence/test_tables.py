"""The measures of the tables: baselines of matches, edits with a known target, and comparisons."""

import json

import pytest
import torch
from torch.testing import assert_close

from cove.metrics import colour_drift, pck, warping_error
from cove.tracks import tracks_of
from evidence.drawing import pixels
from evidence.shapes.classifier import QUESTIONS, answers
from evidence.shapes.clips import MOTIONS, random_clip
from evidence.shapes.scenes import caption
from evidence.tables import edits, matches, results
from evidence.tables.markdown import rows, spread
from evidence.tables.records import Records
from tests.method_helpers import generator, randn


def test_colours_match_by_distance():
    small = torch.rand(2, 7, 11, 3, generator=generator())
    one, other = matches.colours(small, 3).flatten(1, 2)
    near, far = matches.patches(small, 3).flatten(1, 2)
    chosen = (matches.unit(one.double()) @ matches.unit(other.double()).T).argmax(1)
    distances = torch.cdist(near, far)
    assert (distances.gather(1, chosen[:, None])[:, 0] <= 1.02 * distances.amin(1)).all()


def test_agreed_keeps_mutual_matches():
    """By angle: the best match of a token at 0 degrees is 12, whose best match is 20; so it is matched with -15."""
    features = torch.zeros(2, 3, 5, 17)
    features[:, ..., 2:] = torch.eye(15).unflatten(0, (3, 5))  # every other token is similar only to itself
    for frame, token, degrees in ((0, (1, 1), 0), (0, (1, 2), 20), (1, (1, 2), 12), (1, (1, 3), -15)):
        angle = torch.deg2rad(torch.tensor(float(degrees)))
        features[(frame, *token)] = torch.cat((angle.cos()[None], angle.sin()[None], torch.zeros(15)))
    found = matches.agreed(features)
    token = 1 * 5 + 1
    assert found.k == 1 and found.forward[0, token, 0] == 1 * 5 + 3
    assert matches.find_correspondence(features, 9, 1).forward[0, token, 0] == 1 * 5 + 2
    assert found.forward[0, 0, 0] == 0 and found.backward[0, 14, 0] == 14


def test_upper_bounds_are_exact_up_to_rounding():
    """Rounded once, a visible point is off by at most half the diagonal of a token; link by link by more."""
    size = 29
    for seed, motion in enumerate(MOTIONS):
        clip = random_clip(generator(seed), 5, motion)
        bounds = dict(matches.upper_bounds(clip, size))
        for frame in (0, 3):
            true, visible = clip.tracks(frame, size)
            once, linked = (
                pck(bounds[f"true motion, {how}"](frame), true, visible, 0.5**0.5 + 1e-4)
                for how in ("in tokens", "link by link")
            )
            assert_close(once, torch.ones_like(once))
            assert (linked[abs(torch.arange(5) - frame) == 1] == 1).all() and (linked <= once).all()


def test_changed_changes_one_visible_property():
    asked = set()
    for seed in range(20):
        clip = random_clip(generator(seed), 3)
        target, question = edits.changed(clip, generator(seed + 100))
        asked.add(question)
        before, after = (answers(one.scenes[0]) for one in (clip, target))
        differ = [name for name, a, b in zip(QUESTIONS, before, after, strict=True) if a != b]
        assert differ == [question] and caption(target.scenes[0]) != caption(clip.scenes[0])
        thing = target.scenes[0].things[0]
        assert thing.colour != target.scenes[0].ground.colour
        for scene, there, old, new in zip(clip.scenes, target.scenes, clip.draw(64), target.draw(64), strict=True):
            ground = scene.on_top(pixels(64)) < 0
            assert ((old - new).abs().amax(-1)[ground] > 0.02).sum() < 0.1 * ground.sum()  # except its edge
            assert (old - new).abs().amax(-1)[~ground].mean() > 0.02 and scene.ground == there.ground


def test_score_prefers_the_target(monkeypatch):
    """The drawn target scores better than itself with noise, and better than the source."""
    monkeypatch.setattr(edits, "SIDE", 64)
    clip = random_clip(generator(2), 4, "move")
    target, question = edits.changed(clip, generator(3))
    right = torch.tensor(answers(target.scenes[0]))

    def classifier(pictures):
        return [torch.eye(20)[answer].expand(len(pictures), -1) for answer in right]

    made = target.draw(64)
    noisy = made + 0.05 * randn(*made.shape)
    clean, worse, other = (edits.score(classifier, target, question, some) for some in (made, noisy, clip.draw(64)))
    assert clean["edited"] == clean["kept"] == 1
    assert clean["PSNR"] > 60 and abs(worse["PSNR"] - 26) < 0.2 and other["PSNR"] < 30
    assert clean["drift"] < worse["drift"] and clean["warping error"] < worse["warping error"]
    # Measured on the object only, along its own motion.
    places, visible = clip.tracks(2, 16)
    thing = clip.scenes[2].on_top(pixels(16)) >= 0
    assert worse["drift"] == colour_drift(noisy, places, visible & thing)
    flow, seen = edits.true_flow(clip, 64)
    assert worse["warping error"] == warping_error(noisy, flow, seen).nanmean().item()
    assert clean["warping error"] < 0.5 * warping_error(made, -flow, seen).nanmean()
    assert tracks_of(matches.true_matches(clip, 16), 2).shape == places.shape


def test_edits_compared_compares_clip_by_clip(monkeypatch):
    """A method that is better by the same amount on each clip has no spread, even if clips differ."""
    plain = {(0, 0): 1.0, (0, 1): 5.0, (1, 0): 30.0}
    found = {name: plain for name in ("source", "target", "spatial-temporal attention")}
    found["COVE, K = 3"] = {key: value + 0.5 for key, value in plain.items()}
    monkeypatch.setattr(results, "METHODS", ("spatial-temporal attention", "COVE, K = 3"))
    measures = (*results.MEASURES, "seconds")
    monkeypatch.setattr(
        results, "edited", lambda name: {key: dict.fromkeys(measures, x) for key, x in found[name].items()}
    )
    lines = results.edits_compared().splitlines()
    assert len(lines) == 3
    name, nearer, steadier, smoother, *more = lines[2].strip("| ").split(" | ")
    assert name == "COVE, K = 3"
    assert (nearer, steadier, smoother) == ("3 of 3", "0 of 3", "0 of 3")  # more PSNR, more drift, more error
    assert more[2] == "0.5 ± 0.0"
    table = results.edits().splitlines()
    assert len(table) == 6 and table[-1].endswith(" 2 |")  # the minimum of 1.5, 5.5 and 30.5 seconds

    del found["COVE, K = 3"][1, 0]
    for table in (results.edits, results.edits_compared):
        with pytest.raises(LookupError):
            table()


def test_attention_cost_compares_run_by_run(monkeypatch, tmp_path):
    """A method that takes a tenth longer in each run takes a tenth longer, even if the machine drifts."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    records = results.Records(tmp_path / "attention_cost.jsonl")
    for frames, factor in ((9, 1.1), (5, 7.0)):  # the second: another size
        for run, seconds in enumerate((100.0, 200.0)):
            for name, times in (("alone", 1.0), ("guided", factor)):
                case = {"frames": frames, "size": "512x320", "family": "sd15", "dtype": "float32", "steps": 1}
                case |= {"attention": name, "run": run}
                records.add(case, {"seconds": times * seconds, "MiB": 1024 * times})
    assert records[case] == {"seconds": 1400.0, "MiB": 7168.0}
    *_, alone, guided = results.attention_cost().splitlines()
    assert alone == "| alone | 150 ± 71 | 0 ± 0 % | 1.0 ± 0.0 GiB | 1.00 ± 0.00 |"
    assert guided == "| guided | 165 ± 78 | 10 ± 0 % | 1.1 ± 0.0 GiB | 1.10 ± 0.00 |"


def test_records_ignore_another_model(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "digest_of", lambda: "new")
    records = results.Records(tmp_path / "samples.jsonl")
    records.add({"seed": 0, "model": "old"}, {"value": 1})
    records.add({"seed": 0, "model": "new"}, {"value": 2})
    records.add({"grid": "64x64"}, {"value": 3})  # without a model
    assert [measured["value"] for _, measured in results.records("samples")] == [2, 3]


def test_records_survive_an_interrupted_write(tmp_path):
    path = tmp_path / "folder" / "some.jsonl"
    records = Records(path)
    records.add({"seed": 0, "method": "a"}, {"value": 1.5})
    records.add({"seed": 1, "method": "a"}, {"value": 2.5})
    with path.open("a") as file:
        file.write('{"case": {"seed": 2')  # killed while writing
    again = Records(path)
    assert {"method": "a", "seed": 1} in again and {"seed": 2, "method": "a"} not in again
    again.add({"seed": 2, "method": "a"}, {"value": 3.5})
    again.add({"seed": 0, "method": "a"}, {"value": 9.0})
    found = list(Records(path))
    assert [(case["seed"], measured["value"]) for case, measured in found] == [(0, 9.0), (1, 2.5), (2, 3.5)]
    assert len(Records(path).machines()) == 1
    assert json.loads(path.read_text().splitlines()[1])["case"] == {"seed": 0, "method": "a"}


def test_spread_is_over_seeds():
    values = [(0, 1.0), (0, 3.0), (1, 4.0), (1, float("nan")), (2, 6.0)]
    assert spread(values, 2) == "4.00 ± 2.00"
    assert spread(values[:2], 1) == "2.0" and spread([(0, float("nan"))], 1) == "-"


def test_rows_format_markdown():
    assert rows(["", "a"], [["b", "1"]]) == "|  | a |\n| --- | --- |\n| b | 1 |"
