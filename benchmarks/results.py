"""Puts what was measured into docs/results.md: tables between its markers, and plots beside it.

    python benchmarks/results.py

The words around the tables are ours, and stay. A table whose measurements are missing stays as it is, and is named.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.edits import FRAMES, SOURCE, STEPS, TARGET, WAYS, case_of  # noqa: E402
from benchmarks.matches import CLOSER, DRAWS, MIXED, NOISES, PATCHES, TIMESTEPS, WINDOW, WINDOWS  # noqa: E402
from benchmarks.model import digest_of  # noqa: E402
from benchmarks.records import FOLDER, Records  # noqa: E402

PAGE = ROOT / "docs" / "results.md"
PAPER, STEADY = "1 draw", f"{DRAWS} draws"
LEVELS = ("level 0", "level 1", "level 2", "all levels")
NEAR, FAR = "things, 1, 1.0", "things, 5, 1.5"  # points of the things, after so many frames, within so many tokens
SHARES = {
    NEAR: "1 frame on, within 1",
    FAR: "5 on, within 1.5",
    "things, 5, 1.0": "5 on, within 1",
    "all, 5, 1.5": "all",
}
MEASURES = {"edited": 2, "kept": 2, "PSNR": 1, "drift": 4, "warping error": 5}  # and digits
PLAIN = "spatial-temporal attention"  # what guided attention is added to


def records(name: str) -> list[tuple[dict, dict]]:
    """(case, measured) of a benchmark; on the demo model as it is now, if it was measured on a demo model."""
    model = digest_of()
    found = [one for one in Records(FOLDER / f"{name}.jsonl") if one[0].get("model", model) == model]
    if not found:
        raise LookupError(name)
    return found


def spread(values: Iterable[tuple[int, float]], digits: int) -> str:
    """Mean over the seeds of their means, and their standard deviation, of (seed, value)."""
    of_seed: dict[int, list[float]] = {}
    for seed, value in values:
        if not math.isnan(value):
            of_seed.setdefault(seed, []).append(value)
    means = [sum(some) / len(some) for some in of_seed.values()]
    if not means:
        return "-"
    if len(means) < 2:
        return f"{means[0]:.{digits}f}"
    return f"{statistics.mean(means):.{digits}f} ± {statistics.stdev(means):.{digits}f}"


def mean(values: Iterable[float]) -> float:
    """Of those that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known)


def rows(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines))


# ---- tables ----


def measured_on() -> str:
    files = sorted(FOLDER.glob("*.jsonl"))
    if not files:
        raise LookupError("anything")
    machines: dict[str, list[str]] = {}
    for file in files:
        for machine in Records(file).machines():
            machines.setdefault(machine, []).append(file.stem)
    return "\n".join(f"- {machine}: {', '.join(names)}" for machine, names in machines.items())


def samples() -> str:
    found = records("samples")
    questions = found[0][1]["drawn"]
    lines = (
        [name, *(spread(((case["seed"], m[name][question]) for case, m in found), 2) for question in questions)]
        for name in ("sampled", "drawn")
    )
    return rows(["", *questions], lines)


def share(way: str, measure: str) -> str:
    return spread(((case["seed"], ways[way][measure]) for case, ways in records("matches")), 2)


def _matches(ways: dict[str, str]) -> str:
    heads = ["matches by", *SHARES.values()]
    return rows(heads, ([name, *(share(way, measure) for measure in SHARES)] for name, way in ways.items()))


def matches_baselines() -> str:
    ways = {
        "level 0, t = 261, 1 draw (the paper)": f"level 0, t 261, {PAPER}",
        "level 1, t = 261, 1 draw": f"level 1, t 261, {PAPER}",
        "level 2, t = 261, 1 draw (DIFT's level)": f"level 2, t 261, {PAPER}",
    }
    patches = [f"RGB {side}x{side}{refined}" for side in PATCHES for refined in ("", ", refined")]
    true = [f"true motion, {how}" for how in ("link by link", "in tokens")]
    return _matches({way: way for way in ("no motion", *patches, "DIS flow", "DIS flow, in tokens", *true)} | ways)


def matches_settings() -> str:
    heads = ["5 frames on, t = 261", *NOISES]
    return rows(heads, ([level, *(share(f"{level}, t 261, {noise}", FAR) for noise in NOISES)] for level in LEVELS))


def matches_timesteps() -> str:
    heads = [f"5 frames on, {STEADY}", *(f"t = {timestep}" for timestep in TIMESTEPS)]
    levels = ([level, *(share(f"{level}, t {t}, {STEADY}", FAR) for t in TIMESTEPS)] for level in LEVELS)
    return rows(heads, levels)


def matches_better() -> str:
    ways = {}
    for timestep, noise in CLOSER:
        for level in ("level 0", "level 1", "all levels"):
            tried = ("", ", refined") if level == "level 0" else ("", ", agreed", ", neighbours", ", refined")
            tried += (", neighbours, refined",) if level == "level 1" else ()
            for way in tried:
                name = f"{level}{way}, t {timestep}, {noise}"
                ways[name.replace("t ", "t = ")] = name
    for side in MIXED:
        for how in ("", ", refined"):
            ways[f"mixed, {side}x{side}{how}"] = f"mixed, {side}x{side}{how}"
    return _matches(ways)


def matches_windows() -> str:
    where = f"t 261, {STEADY}"
    heads = [f"level 1, t = 261, {STEADY}", "1 frame on", "5 frames on"]
    named = {window: f"level 1, window {window}, {where}" for window in WINDOWS}
    named[WINDOW] = f"level 1, {where}"
    lines = ([_window(window, 32), share(named[window], NEAR), share(named[window], FAR)] for window in sorted(named))
    return rows(heads, lines)


CARRIERS = (
    *("no motion", "RGB 5x5", "RGB 5x5, refined", "DIS flow"),
    *(f"{level}, t 261, {STEADY}" for level in LEVELS),
    *(f"level 1, {way}, t 261, {STEADY}" for way in ("neighbours", "refined")),
    *(f"mixed, {side}x{side}, refined" for side in MIXED),
)


def _carried(name: str, what: str, digits: int) -> str:
    found = records(name)
    lines = (
        [way, *(spread(((case["seed"], m[way][after]) for case, m in found), digits) for after in ("1", "5"))]
        for way in CARRIERS
    )
    return rows([f"{what} carried by", "1 frame on", "5 frames on"], lines)


def masks() -> str:
    return _carried("masks", "masks", 2)


def real_clips() -> str:
    return _carried("real_clips", "colours", 1)


def _window(window: int, side: int) -> str:
    return "none" if window >= 2 * side - 1 else str(window)


def edited(name: str) -> dict[tuple[int, int], dict]:
    """(seed, clip) -> what was measured of it, edited this way with the settings that the way has now."""
    wanted = case_of(name, FRAMES, STEPS)
    return {(case["seed"], case["clip"]): m for case, m in records("edits") if case.items() >= wanted.items()}


def check_edited() -> None:
    """LookupError unless every way was measured on the same clips: a table of some ways, or some clips, misleads."""
    clips = {name: edited(name).keys() for name in (TARGET, SOURCE, *WAYS)}
    if not clips[PLAIN] or any(some != clips[PLAIN] for some in clips.values()):
        raise LookupError("edits")


def edits() -> str:
    check_edited()
    lines = []
    for name in (TARGET, SOURCE, *WAYS):
        of_way = edited(name)
        cells = [spread(((key[0], m[what]) for key, m in of_way.items()), n) for what, n in MEASURES.items()]
        # The least of any clip: it has least of what else the machine did.
        seconds = f"{min(m['seconds'] for m in of_way.values()):.0f}" if name in WAYS else "-"  # nothing was edited
        lines.append([name, *cells, seconds])
    return rows(["", *MEASURES, "seconds"], lines)


def edits_compared() -> str:
    """Clip by clip, what a way has more than spatial-temporal attention alone, and in how many it is better."""
    check_edited()
    plain, lines = edited(PLAIN), []
    for name in WAYS:
        if name == PLAIN:
            continue
        of_way = edited(name)
        more = {what: [(key[0], of_way[key][what] - plain[key][what]) for key in plain] for what in MEASURES}
        better = (
            sum(difference * sign > 0 for _, difference in more[what])
            for what, sign in (("PSNR", 1), ("drift", -1), ("warping error", -1))
        )
        cells = (spread(more[what], digits) for what, digits in MEASURES.items())
        lines.append([name, *(f"{clips} of {len(plain)}" for clips in better), *cells])
    return rows(["", "nearer", "steadier", "smoother", *MEASURES], lines)


def reconstruction() -> str:
    found = records("reconstruction")
    lines = []
    for steps, refinements in sorted({(case["steps"], case["refinements"]) for case, _ in found}):
        line = [str(steps), str(refinements)]
        for guided in (False, True):
            wanted = {"steps": steps, "refinements": refinements, "guided": guided}
            values = [(case["seed"], m["lowest PSNR"]) for case, m in found if case.items() >= wanted.items()]
            line.append(f"{spread(values, 1)} dB")
        lines.append(line)
    return rows(["steps", "refinements", "plain", "guided"], lines)


def of_runs(name: str, key: str, defaults: dict) -> dict[str | int, dict[int, dict]]:
    """What `key` names -> run -> what a cost benchmark measured at its default sizes."""
    found: dict[str | int, dict[int, dict]] = {}
    for case, measured in records(name):
        if case.items() >= defaults.items():
            found.setdefault(case[key], {})[case["run"]] = measured
    return found


def correspondence_cost() -> str:
    lines = []
    for window, runs in of_runs("correspondence_cost", "window", {"frames": 20, "grid": "64x64"}).items():
        operations = f"{runs[0]['operations'] / 1e9:.3f} e9"
        seconds, memory = (
            spread(((run, m[what]) for run, m in runs.items()), n) for what, n in (("seconds", 1), ("MiB", 0))
        )
        lines.append([_window(window, 64), operations, seconds, f"{memory} MiB"])
    return rows(["window", "operations", "seconds", "working memory"], lines)


def attention_cost() -> str:
    found = of_runs("attention_cost", "attention", {"frames": 9, "size": "512x320"})
    alone, lines = next(iter(found.values())), []
    for name, runs in found.items():
        seconds = spread(((run, m["seconds"]) for run, m in runs.items()), 0)
        slower = spread(((run, 100 * (m["seconds"] / alone[run]["seconds"] - 1)) for run, m in runs.items()), 0)
        memory = spread(((run, m["MiB"] / 1024) for run, m in runs.items()), 1)
        larger = spread(((run, m["MiB"] / alone[run]["MiB"]) for run, m in runs.items()), 2)
        lines.append([name, seconds, f"{slower} %", f"{memory} GiB", larger])
    return rows(["self-attention", "seconds a step", "more time", "working memory", "times the memory"], lines)


def injection_cost() -> str:
    lines = (
        [
            case["storage"],
            *(f"{found[step]:.1f}" for step in ("inversion", "sampling")),
            f"{found['MiB'] / 1024:.2f} GiB",
            f"{found['stored']:.1f} MiB" if found["stored"] else "-",
        ]
        for case, found in records("injection_cost")
    )
    heads = ["storage", "seconds a step, inversion", "seconds a step, sampling", "working memory", "stored a step"]
    return rows(heads, lines)


TABLES: tuple[Callable[[], str], ...] = (
    measured_on,
    samples,
    matches_baselines,
    matches_settings,
    matches_timesteps,
    matches_better,
    matches_windows,
    masks,
    real_clips,
    edits,
    edits_compared,
    reconstruction,
    correspondence_cost,
    attention_cost,
    injection_cost,
)


# ---- plots ----


def plot_matches(path: Path) -> None:
    """Share of points found against the timestep: a panel a kind of noise, a curve a level."""
    from matplotlib.figure import Figure

    found = records("matches")
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, noise in zip(panels.flat, NOISES, strict=True):
        for level in LEVELS:
            curve = [mean(ways[f"{level}, t {timestep}, {noise}"][FAR] for _, ways in found) for timestep in TIMESTEPS]
            axes.plot(TIMESTEPS, curve, marker="o", markersize=3, label=level)
        for way, style in (("RGB 5x5", ":"), ("DIS flow", "--"), ("true motion, link by link", "-.")):
            axes.axhline(mean(ways[way][FAR] for _, ways in found), color="grey", linestyle=style, label=way)
        axes.set_title(noise, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("timestep")
    panels[0, 0].legend(fontsize=7)
    figure.supylabel("points of the things found, 5 frames on, within 1.5 tokens", fontsize=9)
    figure.savefig(path, dpi=110)


def plot_edits(path: Path) -> None:
    """How near an edit comes to what was asked for, against how steady it is; without injection, both are far off."""
    from matplotlib.figure import Figure

    check_edited()
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(name for name, way in WAYS.items() if way.injection):
        some = edited(name).values()
        means = (mean(measured[what] for measured in some) for what in ("PSNR", "drift"))
        axes.scatter(*([mean] for mean in means), marker="os^Dvp*"[number // 10], label=name)
    axes.set_xlabel("PSNR to what was asked for, in dB (more is nearer)")
    axes.set_ylabel("colour drift along true tracks (less is steadier)")
    axes.legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.savefig(path, dpi=110)


PLOTS = {"matches.png": plot_matches, "edits.png": plot_edits}


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for make in TABLES:
        name, marker = make.__name__, f"<!-- {make.__name__} -->"
        if page.count(marker) != 2:
            sys.exit(f"{PAGE}: expected `{marker}` before and after its table, found it {page.count(marker)} times")
        try:
            made = make()
        except LookupError as missing:
            print(f"{name}: stays as it is, {missing} not measured yet")
            continue
        page = re.sub(f"{marker}.*{marker}", lambda _, m=marker, t=made: f"{m}\n{t}\n{m}", page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")
    (PAGE.parent / "results").mkdir(exist_ok=True)
    for name, draw in PLOTS.items():
        try:
            draw(PAGE.parent / "results" / name)
        except LookupError as missing:
            print(f"{name}: stays as it is, {missing} not measured yet")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
