"""Write measurements into docs/results.md: tables between its markers, and plots in docs/results/.

    python -m evidence.tables.results

The text around the tables is written by hand. A table without measurements is left unchanged and reported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from scripts.host import PACK

from .demo import digest_of
from .edits import FRAMES, METHODS, SOURCE, STEPS, TARGET, case_of
from .kernels import kernel_estimate, kernel_report
from .markdown import mean, rows, spread
from .matches import CLOSER, DRAWS, MIXED, NOISES, PATCHES, TIMESTEPS, WINDOW, WINDOWS
from .records import FOLDER, Records

PAGE = PACK / "docs" / "results.md"
PAPER, STEADY = "1 draw", f"{DRAWS} draws"
LEVELS = ("level 0", "level 1", "level 2", "all levels")
NEAR, FAR = "things, 1, 1.0", "things, 5, 1.5"  # points on things, after n frames, within a radius in tokens
SHARES = {
    NEAR: "after 1 frame, within 1",
    FAR: "after 5 frames, within 1.5",
    "things, 5, 1.0": "after 5 frames, within 1",
    "all, 5, 1.5": "all points",
}
MEASURES = {"edited": 2, "kept": 2, "PSNR": 1, "drift": 4, "warping error": 5}  # and digits
PLAIN = "spatial-temporal attention"  # the baseline of guided attention


def records(name: str) -> list[tuple[dict, dict]]:
    """Return (case, measured) of a table or benchmark, excluding measurements on another demo model."""
    model = digest_of()
    found = [one for one in Records(FOLDER / f"{name}.jsonl") if one[0].get("model", model) == model]
    if not found:
        raise LookupError(name)
    return found


# ---- tables ----


def measured_on() -> str:
    files = sorted(FOLDER.glob("*.jsonl"))
    if not files:
        raise LookupError("every table")
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


def share(method: str, measure: str) -> str:
    return spread(((case["seed"], found[method][measure]) for case, found in records("matches")), 2)


def _matches(methods: dict[str, str]) -> str:
    heads = ["matches by", *SHARES.values()]
    return rows(heads, ([name, *(share(method, measure) for measure in SHARES)] for name, method in methods.items()))


def matches_baselines() -> str:
    methods = {
        "level 0, t = 261, 1 draw": f"level 0, t 261, {PAPER}",
        "level 1, t = 261, 1 draw (the paper)": f"level 1, t 261, {PAPER}",
        "level 2, t = 261, 1 draw (DIFT's level)": f"level 2, t 261, {PAPER}",
    }
    patches = [f"RGB {side}x{side}{refined}" for side in PATCHES for refined in ("", ", refined")]
    true = [f"true motion, {how}" for how in ("link by link", "in tokens")]
    return _matches(
        {method: method for method in ("no motion", *patches, "DIS flow", "DIS flow, in tokens", *true)} | methods
    )


def matches_settings() -> str:
    heads = ["after 5 frames, t = 261", *NOISES]
    return rows(heads, ([level, *(share(f"{level}, t 261, {noise}", FAR) for noise in NOISES)] for level in LEVELS))


def matches_timesteps() -> str:
    heads = [f"after 5 frames, {STEADY}", *(f"t = {timestep}" for timestep in TIMESTEPS)]
    levels = ([level, *(share(f"{level}, t {t}, {STEADY}", FAR) for t in TIMESTEPS)] for level in LEVELS)
    return rows(heads, levels)


def matches_better() -> str:
    methods = {}
    for timestep, noise in CLOSER:
        for level in ("level 0", "level 1", "all levels"):
            tried = ("", ", refined") if level == "level 0" else ("", ", agreed", ", neighbours", ", refined")
            tried += (", neighbours, refined",) if level == "level 1" else ()
            for method in tried:
                name = f"{level}{method}, t {timestep}, {noise}"
                methods[name.replace("t ", "t = ")] = name
    for side in MIXED:
        for how in ("", ", refined"):
            methods[f"mixed, {side}x{side}{how}"] = f"mixed, {side}x{side}{how}"
    return _matches(methods)


def matches_windows() -> str:
    where = f"t 261, {STEADY}"
    heads = [f"level 1, t = 261, {STEADY}", "after 1 frame", "after 5 frames"]
    named = {window: f"level 1, window {window}, {where}" for window in WINDOWS}
    named[WINDOW] = f"level 1, {where}"
    lines = ([_window(window, 32), share(named[window], NEAR), share(named[window], FAR)] for window in sorted(named))
    return rows(heads, lines)


PROPAGATED = (
    *("no motion", "RGB 5x5", "RGB 5x5, refined", "DIS flow"),
    *(f"{level}, t 261, {STEADY}" for level in LEVELS),
    *(f"level 1, {method}, t 261, {STEADY}" for method in ("neighbours", "refined")),
    *(f"mixed, {side}x{side}, refined" for side in MIXED),
)


def real_clips() -> str:
    found = records("real_clips")
    lines = (
        [method, *(spread(((case["seed"], m[method][after]) for case, m in found), 1) for after in ("1", "5"))]
        for method in PROPAGATED
    )
    return rows(["colours propagated by", "after 1 frame", "after 5 frames"], lines)


def _window(window: int, side: int) -> str:
    return "none" if window >= 2 * side - 1 else str(window)


def edited(name: str) -> dict[tuple[int, int], dict]:
    """Return the measurements of a method with its current settings, by (seed, clip)."""
    wanted = case_of(name, FRAMES, STEPS)
    return {(case["seed"], case["clip"]): m for case, m in records("edits") if case.items() >= wanted.items()}


def check_edited() -> None:
    """Raise LookupError unless every method was measured on the same clips: an incomplete table misleads."""
    clips = {name: edited(name).keys() for name in (TARGET, SOURCE, *METHODS)}
    if not clips[PLAIN] or any(some != clips[PLAIN] for some in clips.values()):
        raise LookupError("edits")


def edits() -> str:
    check_edited()
    lines = []
    for name in (TARGET, SOURCE, *METHODS):
        found = edited(name)
        cells = [spread(((key[0], m[what]) for key, m in found.items()), n) for what, n in MEASURES.items()]
        # The minimum over clips is least disturbed by other processes.
        seconds = f"{min(m['seconds'] for m in found.values()):.0f}" if name in METHODS else "-"  # no edit
        lines.append([name, *cells, seconds])
    return rows(["", *MEASURES, "seconds"], lines)


def edits_compared() -> str:
    """Compare each method with spatial-temporal attention alone, clip by clip."""
    check_edited()
    plain, lines = edited(PLAIN), []
    for name in METHODS:
        if name == PLAIN:
            continue
        found = edited(name)
        more = {what: [(key[0], found[key][what] - plain[key][what]) for key in plain] for what in MEASURES}
        better = (
            sum(difference * sign > 0 for _, difference in more[what])
            for what, sign in (("PSNR", 1), ("drift", -1), ("warping error", -1))
        )
        cells = (spread(more[what], digits) for what, digits in MEASURES.items())
        lines.append([name, *(f"{clips} of {len(plain)}" for clips in better), *cells])
    return rows(["", "closer", "steadier", "smoother", *MEASURES], lines)


def reconstruction() -> str:
    found = records("reconstruction")
    lines = []
    settings = ("steps", "multiple", "refinements", "extrapolate")
    for values in sorted({tuple(case[name] for name in settings) for case, _ in found}):
        wanted = dict(zip(settings, values, strict=True))
        chosen = [(case, measured) for case, measured in found if case.items() >= wanted.items()]
        evaluations = {measured["evaluations"] for _, measured in chosen}
        line = [*map(str, values[:-1]), "previous step" if values[-1] else "scaled", "-".join(map(str, evaluations))]
        for guided in (False, True):
            some = [(case["seed"], measured["lowest PSNR"]) for case, measured in chosen if case["guided"] == guided]
            line.append(f"{spread(some, 1)} dB" if some else "-")
        lines.append(line)
    return rows(["steps", "multiple", "refinements", "first guess", "evaluations", "plain", "guided"], lines)


def of_runs(name: str, key: str, defaults: dict) -> dict[str | int, dict[int, dict]]:
    """Return a cost benchmark's measurements at its default sizes, by value of `key`, then by run."""
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
    sizes = {"frames": 9, "size": "512x320", "family": "sd15", "dtype": "float32", "steps": 1}
    found = of_runs("attention_cost", "attention", sizes)
    alone, lines = next(iter(found.values())), []
    for name, runs in found.items():
        seconds = spread(((run, m["seconds"]) for run, m in runs.items()), 0)
        slower = spread(((run, 100 * (m["seconds"] / alone[run]["seconds"] - 1)) for run, m in runs.items()), 0)
        memory = spread(((run, m["MiB"] / 1024) for run, m in runs.items()), 1)
        larger = spread(((run, m["MiB"] / alone[run]["MiB"]) for run, m in runs.items()), 2)
        lines.append([name, seconds, f"{slower} %", f"{memory} GiB", larger])
    return rows(["self-attention", "seconds per step", "time overhead", "working memory", "relative memory"], lines)


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
    seconds = (f"seconds per step, {run}" for run in ("inversion", "sampling"))
    return rows(["storage", *seconds, "working memory", "stored per step"], lines)


TABLES: tuple[Callable[[], str], ...] = (
    measured_on,
    samples,
    matches_baselines,
    matches_settings,
    matches_timesteps,
    matches_better,
    matches_windows,
    real_clips,
    edits,
    edits_compared,
    reconstruction,
    correspondence_cost,
    attention_cost,
    injection_cost,
    kernel_estimate,
    kernel_report,
)


# ---- plots ----


def plot_matches(path: Path) -> None:
    """Plot the share of points found over the timestep: one panel per kind of noise, one curve per level."""
    from matplotlib.figure import Figure

    found = records("matches")
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, noise in zip(panels.flat, NOISES, strict=True):
        for level in LEVELS:
            curve = [
                mean(methods[f"{level}, t {timestep}, {noise}"][FAR] for _, methods in found) for timestep in TIMESTEPS
            ]
            axes.plot(TIMESTEPS, curve, marker="o", markersize=3, label=level)
        for method, style in (("RGB 5x5", ":"), ("DIS flow", "--"), ("true motion, link by link", "-.")):
            axes.axhline(mean(m[method][FAR] for _, m in found), color="grey", linestyle=style, label=method)
        axes.set_title(noise, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("timestep")
    panels[0, 0].legend(fontsize=7)
    figure.supylabel("share of points on shapes within 1.5 tokens after 5 frames", fontsize=9)
    figure.savefig(path, dpi=110)


def plot_edits(path: Path) -> None:
    """Plot colour drift over PSNR of the methods with injection."""
    from matplotlib.figure import Figure

    check_edited()
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(name for name, method in METHODS.items() if method.injection):
        some = edited(name).values()
        means = (mean(measured[what] for measured in some) for what in ("PSNR", "drift"))
        axes.scatter(*([mean] for mean in means), marker="os^Dvp*"[number // 10], label=name)
    axes.set_xlabel("PSNR to the target, in dB (higher is better)")
    axes.set_ylabel("colour drift along true tracks (lower is better)")
    axes.legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.savefig(path, dpi=110)


PLOTS = {"matches.png": plot_matches, "edits.png": plot_edits}


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for make in TABLES:
        name, marker = make.__name__, f"<!-- {make.__name__} -->"
        if page.count(marker) != 2:
            sys.exit(f"{PAGE}: expected `{marker}` before and after its table, found {page.count(marker)}")
        try:
            made = make()
        except LookupError as missing:
            print(f"{name}: not updated, {missing} is not measured yet")
            continue
        page = re.sub(f"{marker}.*{marker}", lambda _, m=marker, t=made: f"{m}\n{t}\n{m}", page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")
    (PAGE.parent / "results").mkdir(exist_ok=True)
    for name, draw in PLOTS.items():
        try:
            draw(PAGE.parent / "results" / name)
        except LookupError as missing:
            print(f"{name}: not updated, {missing} is not measured yet")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
