"""Writes the tables and the figure of what the constraint costs, from the committed results."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from lightning_tpgm.methods.tpgm import CADENCE
from lightning_tpgm.observing.plotting import BLUE, ORANGE, axes_for, name_lines

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "docs" / "cost.md"
MAIN = ("ResNet-50", "ViT-B/16", "MiniLM-L6")
DIGITS = ("digits CNN", 32)  # as examples/digits trains it
WITHOUT_EVALUATION = ("FTP, mars", "FTP, l2", "DiGraP", "SPD", "L2-SP")
PURPLE, SKY = "#CC79A7", "#56B4E9"  # of the same palette
AT_END, END = "TPGM at the end, from a file", "TPGM at the end, while it acts"
PROJECTION = {**dict.fromkeys(MAIN, 1.25), "2,000 tiny tensors": 2.0}
"""What a projection may take, over three copies."""
FASTER = 0.71
"""At least 1.4 times as fast as a transcription."""
COPIES = 5.5
"""The floor of TPGM's own passes over the constrained weights, in copies (one read and one write) of them. They read W
and W0 and write D. Before and after the evaluation they read D and W0 and write W. At last they read G and D."""
PASSES = {
    "TPGM, mars": 2 * COPIES,
    "TPGM, l2": 2 * COPIES,
    "TPGM, no update": 5,
    "FTP": 8,
    "SPD": mean((9, 6)),
    "DiGraP": mean((8, 5)),
    "L2-SP": 4,
}
"""Reads and writes of the constrained weights in a step, as docs/cost.md counts them; two take the time of a copy. Of
TPGM's update they are those of the floor. It makes two more, since it keeps a copy of W instead of D. Of SPD and DiGraP
they are the mean of tensors that change and of those left alone: gradients are random, about half are of either kind.
"""
PEERS = ("FTP", "SPD", "DiGraP")  # that have a transcription in own.csv

Times = dict[tuple[str, int], dict[str, float]]
Lines = dict[str, list[tuple[float, float]]]


def read(path: Path) -> Times:
    """Median seconds by model and batch size, and by what was timed; also the numbers of parameters and tensors."""
    found: Times = {}
    if not path.exists():  # nothing has been measured yet
        return found
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            times = found.setdefault((row["model"], int(row["batch"])), {})
            times |= {row["what"]: float(row["seconds"])}
            times |= {name: int(row[name]) for name in ("parameters", "tensors")}
    return dict(sorted(found.items(), key=lambda item: item[0][1]))  # by batch size; models as they come


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown, numbers to the right."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tpgm_seconds(t: Mapping[str, float]) -> float:
    """TPGM in a step as it comes: an update in one of so many."""
    return (t["TPGM, mars"] + (CADENCE - 1) * t["TPGM, mars: projection"]) / CADENCE


def step_table(times: Times) -> str:
    """A step with each method as it comes, over a plain step."""
    methods = {"FTP, mars": "FTP", "DiGraP": "DiGraP", "SPD": "SPD", "L2-SP": "L2-SP"}
    head = ["", "batch", "plain step, s", "plain + TPGM", "half the held-out batch"]
    rows = []
    for (model, batch), t in times.items():
        tpgm = tpgm_seconds(t)
        own = [tpgm, tpgm - t["evaluation"] / 2 / CADENCE, *(t[name] for name in methods)]
        shares = [f"{1 + seconds / t['plain step']:.2f}" for seconds in own]
        rows.append([model, str(batch), f"{t['plain step']:.3g}", *shares])
    return table([*head, *(f"plain + {name}" for name in methods.values())], rows)


def floor_table(times: Times) -> str:
    """An update of TPGM over its floor, and what the naive transcriptions take over the methods."""
    tpgms = ("TPGM, mars", "TPGM, l2")
    peers = {"TPGM, mars": "naive", "TPGM, l2": "naive, l2", "FTP, mars": "naive FTP", "FTP, l2": "naive FTP, l2"}
    head = ["", "batch", *(f"{name} / floor" for name in tpgms), *(f"naive / {name}" for name in peers)]
    rows = []
    for (model, batch), t in times.items():
        floor = t["evaluation"] + COPIES * t["copy"]
        tpgm = [f"{t[name] / floor:.2f}" for name in tpgms]
        naive = [f"{t[peer] / t[name]:.2f}" for name, peer in peers.items()]
        rows.append([model, str(batch), *tpgm, *naive, f"{1 + t['FTP, l2'] / t['plain step']:.2f}"])
    return table([*head, "plain + FTP, l2"], rows)


def too_slow(times: Times, own: Times) -> list[str]:
    """The ratios that are above what they should be: what a change made slower. Read them with the machine's noise."""
    found = []
    for (model, batch), t in times.items():
        ratios: dict[str, tuple[float, float]] = {}
        floor = t["evaluation"] + COPIES * t["copy"]
        for norm in ("mars", "l2"):
            if (model, batch) in ((MAIN[0], 8), (MAIN[1], 8)):
                ratios[f"TPGM, {norm} / floor"] = (t[f"TPGM, {norm}"] / floor, 1.1)
            if batch == 1 and model in PROJECTION:
                ratio = t[f"TPGM, {norm}: projection"] / (3 * t["copy"])
                ratios[f"projection, {norm} / three copies"] = (ratio, PROJECTION[model])
        if batch == 32 and model in MAIN:
            ratios |= {
                f"plain + {name}": (1 + t[name] / t["plain step"], 1.1)
                for name in WITHOUT_EVALUATION
                if name != "DiGraP"
            }
        if (model, batch) == DIGITS or (batch == 8 and model in MAIN):
            bound = 1.5 if (model, batch) == DIGITS else 1.3
            ratios["plain + TPGM"] = (1 + tpgm_seconds(t) / t["plain step"], bound)
        for norm, more in {"mars": "", "l2": ", l2"}.items():
            # at batch 32 the evaluation is nearly all of a large model's update, and hides the rest
            if batch < 32 or model not in (*MAIN, DIGITS[0]):
                ratios[f"TPGM, {norm} / naive"] = (t[f"TPGM, {norm}"] / t[f"naive{more}"], 1.0)
            if model != DIGITS[0]:
                bound = FASTER if model in MAIN[:2] and batch < 32 else 1.0
                ratios[f"FTP, {norm} / naive FTP"] = (t[f"FTP, {norm}"] / t[f"naive FTP{more}"], bound)
        found += above(f"{model}, batch {batch}", ratios)
    for (model, _), t in own.items():  # SPD meets none everywhere
        bounds = {"FTP": FASTER if model in MAIN[:2] else 1.0, "DiGraP": 1.0}
        ratios = {f"{name} / naive {name}": (t[name] / t[f"naive {name}"], bound) for name, bound in bounds.items()}
        found += above(f"{model}, own work", ratios)
    return found


def above(where: str, ratios: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    """The ratios that are above their bounds, in words."""
    for name, (value, bound) in ratios.items():
        if value > bound:
            yield f"{where}: {name} = {value:.2f}, expected at most {bound}"


def own_tables(own: Times) -> Iterator[str]:
    """A method's own work over the time of its passes, and what the transcriptions take over the methods."""
    if not own:
        return
    head = [f"{name} ({passes:g})" for name, passes in PASSES.items()]
    rows = [
        [model, *(f"{t[name] / (passes / 2 * t['copy']):.2f}" for name, passes in PASSES.items())]
        for (model, _), t in own.items()
    ]
    yield table(["own work / passes", *head], rows)
    rows = [[model, *(f"{t[f'naive {name}'] / t[name]:.2f}" for name in PEERS)] for (model, _), t in own.items()]
    yield table(["naive / own work", *PEERS], rows)


def projection_table(times: Times) -> str:
    """The projection alone, over copying the constrained bytes three times."""
    rows = [
        [model, *(f"{t[f'TPGM, {norm}: projection'] / (3 * t['copy']):.2f}" for norm in ("mars", "l2"))]
        for (model, batch), t in times.items()
        if batch == 1
    ]
    return table(["projection / three copies", "mars", "l2"], rows)


def growth_table(growth: Times) -> str:
    """Microseconds of a projection (mars), in brackets of three copies, by the numbers of tensors and parameters."""
    by_size = {(int(t["tensors"]), int(t["parameters"])): t for t in growth.values()}
    sizes = sorted({size for _, size in by_size})
    rows = []
    for tensors in sorted({tensors for tensors, _ in by_size}):
        cells = [by_size[tensors, size] for size in sizes]
        rows.append(
            [f"{tensors:,}", *(f"{1e6 * t['TPGM, mars: projection']:.0f} ({3e6 * t['copy']:.0f})" for t in cells)]
        )
    return table(["tensors, parameters", *(f"{size:,}" for size in sizes)], rows)


def memory_table(path: Path, times: Times) -> str:
    """Peak memory beyond a plain fit's, in units of the constrained bytes; the anchor is one."""
    with path.open(newline="") as file:
        peaks = {(row["model"], row["method"]): int(row["peak_bytes"]) for row in csv.DictReader(file)}
    methods = [method for model, method in peaks if model == MAIN[0] and method != "plain"]
    rows = []
    for model in MAIN:
        if (model, "plain") in peaks:
            bytes_ = 4 * times[model, 1]["parameters"]
            rows.append([model, *(f"{(peaks[model, m] - peaks[model, 'plain']) / bytes_:.2f}" for m in methods)])
    return table(["peak memory beyond plain", *methods], rows)


def figure(growth: Times, path: Path) -> None:
    """Seconds over the number of parameters, a line for each number of tensors."""
    lines: Lines = {}
    copies: list[list[tuple[float, float]]] = []
    for tensors in sorted({int(t["tensors"]) for t in growth.values()}):
        points = sorted((t["parameters"], t) for t in growth.values() if t["tensors"] == tensors)
        lines[f"{tensors:,} tensors"] = [(size, t["TPGM, mars: projection"]) for size, t in points]
        copies.append([(size, 3 * t["copy"]) for size, t in points])
    figure, axes = axes_for(None, width=5.5, height=4)
    colors = (ORANGE, BLUE, "black")
    for points, color in zip(copies, colors, strict=False):  # a quick run has fewer
        axes.plot(*zip(*points, strict=True), linestyle=":", color=color)
    axes.set(xscale="log", yscale="log")
    draw_lines(
        axes, lines, dict(zip(lines, colors, strict=False)), "seconds of a projection (mars), dotted: of three copies"
    )
    axes.set_xlabel("constrained parameters")
    figure.savefig(path, dpi=120)


def draw_lines(axes: Axes, lines: Lines, colors: Mapping[str, str], title: str, dashed: str = "") -> None:
    """Named lines, one of them dashed, in axes whose scales are set."""
    for name, points in lines.items():
        style = "--" if name == dashed else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colors[name])
    axes.set_title(title, loc="left", fontsize="medium")
    name_lines(axes, {name: points[-1] for name, points in lines.items()}, colors)


def read_large(path: Path) -> dict[str, list[dict[str, float]]]:
    """The figures of large models by method, from the smallest to the largest."""
    found: dict[str, list[dict[str, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            figures = {name: float(value) for name, value in row.items() if name not in ("model", "method")}
            found.setdefault(row["method"], []).append(figures)
    return {method: sorted(rows, key=lambda row: row["parameters"]) for method, rows in found.items()}


def large_tables(large: Mapping[str, list[dict[str, float]]]) -> str:
    """Peak memory in units of the weights, in brackets that at the fit's end, and seconds a step, by size."""
    sizes = sorted({row["parameters"] for rows in large.values() for row in rows})
    head = [f"{size / 1e6:,.0f} M" for size in sizes]
    memory, seconds = [], []
    for method, rows in large.items():
        by_size = {row["parameters"]: row for row in rows}
        cells = [by_size.get(size) for size in sizes]
        memory.append([method, *("" if row is None else peaks(row) for row in cells)])
        seconds.append([method, *("" if row is None else f"{row['seconds']:.3g}" for row in cells)])
    tables = table(["peak memory / weights", *head], memory), table(["seconds a step", *head], seconds)
    return "\n\n".join(tables)


def peaks(row: Mapping[str, float]) -> str:
    """Peak memory while training, and in brackets at the end if it is more, over the bytes of the weights."""
    during, end = (row[name] / (4 * row["parameters"]) for name in ("during_bytes", "peak_bytes"))
    return f"{during:.1f}" if end < during + 0.1 else f"{during:.1f} ({end:.1f})"


def large_figure(large: Mapping[str, list[dict[str, float]]], path: Path) -> None:
    """Memory and time of one process over the number of parameters; of TPGM at the end the end's memory, too."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    colors = {"plain": "black", "FTP": PURPLE, "SPD": SKY, "TPGM": BLUE, AT_END: ORANGE, END: ORANGE}
    memory: Lines = {}
    seconds: Lines = {}
    for method in (name for name in colors if name in large):
        rows = large[method]
        memory[method] = [(row["parameters"], row["during_bytes"] / (4 * row["parameters"])) for row in rows]
        seconds[method] = [(row["parameters"], row["seconds"]) for row in rows]
    memory[END] = [(row["parameters"], row["peak_bytes"] / (4 * row["parameters"])) for row in large[AT_END]]
    for axes in (left, right):
        axes_for(axes)
        axes.set(xscale="log", xlabel="parameters")
    left.set_ylim(0, 6.5)
    right.set_yscale("log")
    draw_lines(left, memory, colors, "most memory while training, times the weights", dashed=END)
    draw_lines(right, seconds, colors, "seconds a step, one fit each")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def tables(results: Path) -> str:
    """All tables of a folder of results."""
    times = read(results / "times.csv")
    growth, memory = growth_table(read(results / "growth.csv")), memory_table(results / "memory.csv", times)
    own = own_tables(read(results / "own.csv"))
    found = [step_table(times), floor_table(times), *own, projection_table(times), growth, memory]
    return "\n\n".join([*found, large_tables(read_large(results / "large.csv"))])


def put(text: str, name: str, table: str) -> str:
    """The text with another one between the marks of this name."""
    begin, end = (f"<!-- {name}: {place} -->" for place in ("begin", "end"))
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def documents() -> dict[Path, str]:
    """The two READMEs, with the tables of the committed results in them."""
    times = read(RESULTS / "times.csv")
    details = RESULTS.parent / "README.md"
    return {
        README: put(README.read_text(), "cost", step_table(times)),
        details: put(details.read_text(), "tables", tables(RESULTS)),
    }


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--check", action="store_true", help="fail if a ratio is above its bound; write nothing")
    arguments = parser.parse_args()
    results: Path = arguments.results
    times, growth = read(results / "times.csv"), read(results / "growth.csv")
    if arguments.check:
        sys.exit("\n".join(too_slow(times, read(results / "own.csv"))) or 0)
    figure(growth, results / "growth.png")
    large_figure(read_large(results / "large.csv"), results / "large.png")
    print(json.loads((results / "machine.json").read_text()), tables(results), sep="\n\n")
    if results == RESULTS:
        for path, text in documents().items():
            path.write_text(text)


if __name__ == "__main__":
    main()
