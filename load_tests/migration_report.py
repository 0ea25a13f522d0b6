"""The results of load_tests.migration: numbers, JSON, a Markdown table and a plot."""

import json
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from operator import sub
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

BEFORE, AFTER = 12, 10
"""Tokens of a stream before its move, and after it, that are looked at."""

LABELS = {"live": "live pre-copy", "blocking": "blocking copy", "recompute": "recompute"}
FORMATS = {"live": "C0.-", "blocking": "C1.-", "recompute": "C4.-"}
TITLES = {"tiny": "tiny model, CPU", "a10": "LLaMA-7B on an emulated A10"}

PAPER_MS = {
    "live": [13, 12, 15, 16, 22, 26],
    "blocking": [68, 129, 226, 451, 909, 1682],
    "recompute": [58, 110, 220, 436, 940, 1995],
}
"""Downtimes of LLaMA-7B on A10 GPUs in the paper (Llumnix, OSDI'24), for 256 to 8k tokens."""

HEADING = (
    "| context | way | gap, ms | downtime, ms | stages | blocks | tokens recomputed | step, ms |\n"
    "| --: | :-- | --: | --: | --: | --: | --: | --: |"
)

NOTE = "Downtime: parked there to committed here. What is recomputed after it is in the gap."

Spread = tuple[float, float, float]


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest, largest."""
    return statistics.median(values), min(values), max(values)


def intervals(arrivals: Sequence[float]) -> list[float]:
    """Times between one token and the next."""
    return [later - sooner for sooner, later in pairwise(arrivals)]


def gap(arrivals: Sequence[float], sent: float, answered: float) -> float:
    """The longest interval from that of a move's call until `AFTER` tokens after its answer."""
    first, last = bisect_right(arrivals, sent), bisect_right(arrivals, answered) + AFTER
    return max(intervals(arrivals[max(0, first - 1) : last]))


@dataclass(frozen=True, slots=True)
class Move:
    """One measured move. `step_ms`: the stream's median interval before it."""

    gap_ms: float
    step_ms: float
    downtime_ms: float
    stages: int
    blocks: int
    recomputed_tokens: int

    @classmethod
    def of(
        cls, record: Mapping[str, Any], arrivals: Sequence[float], sent: float, answered: float
    ) -> "Move":
        """From the answer to POST /fleet/migrate and the seconds of its stream and its call."""
        before = intervals(arrivals[: bisect_right(arrivals, sent)])
        gap_ms, step_ms = 1e3 * gap(arrivals, sent, answered), 1e3 * statistics.median(before)
        told = {key: record[key] for key in cls.__slots__ if key in record}
        return cls(gap_ms=gap_ms, step_ms=step_ms, **told)


@dataclass(slots=True)
class Cell:
    """The moves at one pace, in one way, with one context length in tokens."""

    pace: str
    way: str
    context: int
    moves: list[Move] = field(default_factory=list)

    def over(self, key: str) -> Spread:
        """A field of `Move` over the moves."""
        return spread([getattr(move, key) for move in self.moves])


@dataclass(frozen=True, slots=True)
class Window:
    """Seconds of time.perf_counter in which one request was moved `moves` times, or left alone."""

    start: float
    end: float
    moves: int
    moving: bool


def split(arrivals: Sequence[float], windows: Sequence[Window]) -> tuple[list[float], list[float]]:
    """A stream's intervals within windows without moves, and those that touch one with moves.

    Tokens that were read at once share the interval before them.
    """
    quiet, moving = list[float](), list[float]()
    for (sooner, _), (later, tokens) in pairwise(Counter(arrivals).items()):
        if any(w.moving and sooner < w.end and later > w.start for w in windows):
            moving += [(later - sooner) / tokens] * tokens
        elif any(w.start <= sooner and later <= w.end for w in windows):
            quiet += [(later - sooner) / tokens] * tokens
    return quiet, moving


@dataclass(slots=True)
class Slowdown:
    """How much slower other streams are while moves go on; percents of each round."""

    pace: str
    moves: int = 0
    median_percent: list[float] = field(default_factory=list)
    mean_percent: list[float] = field(default_factory=list)
    quiet_ms: list[float] = field(default_factory=list)

    def add(self, streams: Iterable[Sequence[float]], windows: Sequence[Window]) -> None:
        """One round: the arrivals of each stream that stayed."""
        parts = [split(arrivals, windows) for arrivals in streams]
        quiet = [interval for part, _ in parts for interval in part]
        moving = [interval for _, part in parts for interval in part]
        self.moves += sum(window.moves for window in windows)
        medians = statistics.median(moving) / statistics.median(quiet)
        means = statistics.fmean(moving) / statistics.fmean(quiet)
        self.median_percent.append(100 * (medians - 1))
        self.mean_percent.append(100 * (means - 1))
        self.quiet_ms.append(1e3 * statistics.fmean(quiet))


def flatness(cells: Iterable[Cell]) -> float:
    """Largest over smallest median downtime of these cells, over their contexts."""
    medians = [cell.over("downtime_ms")[0] for cell in cells]
    return max(medians) / min(medians)


def downtime_steps(cells: Iterable[Cell]) -> float:
    """The largest median downtime of these cells, in steps of its own cell."""
    return max(cell.over("downtime_ms")[0] / cell.over("step_ms")[0] for cell in cells)


def progress(cell: Cell) -> str:
    """One line of a finished cell."""
    gap_ms, downtime_ms = _shown(cell.over("gap_ms")), _shown(cell.over("downtime_ms"))
    return (
        f"{cell.pace:>5} {cell.way:>10} {cell.context:>5} tokens: gap {gap_ms} ms,"
        f" downtime {downtime_ms} ms, {cell.over('stages')[0]:.0f} stages,"
        f" step {cell.over('step_ms')[0]:.1f} ms"
    )


def slowdown_line(slowdown: Slowdown) -> str:
    """One sentence."""
    return (
        f"slowdown of the others: mean {_shown(spread(slowdown.mean_percent), '+.2f')} %,"
        f" median {_shown(spread(slowdown.median_percent), '+.2f')} %,"
        f" {slowdown.moves} moves (step {statistics.median(slowdown.quiet_ms):.1f} ms)"
    )


def write(cells: Sequence[Cell], slowdowns: Sequence[Slowdown], folder: Path) -> str:
    """Writes migration.json, .md and .svg. Returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"cells": [asdict(c) for c in cells], "slowdowns": [asdict(s) for s in slowdowns]}
    (folder / "migration.json").write_text(json.dumps(content, indent=1) + "\n")
    shown = "\n\n".join(section(cells, slowdown) for slowdown in slowdowns)
    (folder / "migration.md").write_text(shown + "\n")
    _plot(cells, [slowdown.pace for slowdown in slowdowns], folder / "migration.svg")
    return shown


def section(cells: Sequence[Cell], slowdown: Slowdown) -> str:
    """The table of one pace, and what is aimed at."""
    mine = [cell for cell in cells if cell.pace == slowdown.pace]
    live = [cell for cell in mine if cell.way == "live"]
    lines = [
        f"**{TITLES[slowdown.pace]}** (median [min max] of {len(mine[0].moves)} moves)\n",
        HEADING,
        *map(row, sorted(mine, key=lambda cell: cell.context)),
        f"\n{NOTE}\n",
        f"- largest / smallest downtime, live: {flatness(live):.2f} (aim: at most 1.5)",
        f"- largest downtime / step, live: {downtime_steps(live):.2f} (aim: at most 1)",
        f"- {slowdown_line(slowdown)} (aim: at most 1 %)",
    ]
    return "\n".join(lines)


def row(cell: Cell) -> str:
    """Of the table."""
    return (
        f"| {cell.context} | {LABELS[cell.way]} | {_shown(cell.over('gap_ms'))}"
        f" | {_shown(cell.over('downtime_ms'))} | {cell.over('stages')[0]:.0f}"
        f" | {cell.over('blocks')[0]:.0f} | {cell.over('recomputed_tokens')[0]:.0f}"
        f" | {cell.over('step_ms')[0]:.1f} |"
    )


def _shown(spread: Spread, form: str = ".1f") -> str:
    median, low, high = (format(value, form) for value in spread)
    return f"{median} [{low} {high}]"


def _plot(cells: Sequence[Cell], paces: Sequence[str], file: Path) -> None:
    figure = pyplot.figure(figsize=(5 * len(paces), 4), layout="constrained")
    for place, pace in enumerate(paces, start=1):
        axes = figure.add_subplot(1, len(paces), place)
        if pace == "a10":
            _plot_paper(axes)
        for way in LABELS:
            _plot_way(axes, [cell for cell in cells if (cell.pace, cell.way) == (pace, way)])
        _dress(axes, TITLES[pace], sorted({cell.context for cell in cells}))
    figure.savefig(file)
    pyplot.close(figure)


def _plot_way(axes: Axes, cells: Sequence[Cell]) -> None:
    way, contexts = cells[0].way, [cell.context for cell in cells]
    medians, lows, highs = zip(*(cell.over("gap_ms") for cell in cells), strict=True)
    whiskers = [list(map(sub, medians, lows)), list(map(sub, highs, medians))]
    axes.errorbar(contexts, medians, whiskers, fmt=FORMATS[way], capsize=3, label=LABELS[way])
    if way == "live":
        steps = [cell.over("step_ms")[0] for cell in cells]
        axes.plot(contexts, steps, "k--", lw=1, label="decode step")


def _plot_paper(axes: Axes) -> None:
    times = list(zip(*PAPER_MS.values(), strict=True))
    lines = axes.plot([256 << n for n in range(6)], times, color="#c8c8c8")
    lines[0].set_label("the paper's downtimes")


def _dress(axes: Axes, title: str, contexts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{c // 1024}k" if c >= 1024 else str(c) for c in contexts])
    axes.set(yscale="log", ylabel="gap, ms", xlabel="context, tokens", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
