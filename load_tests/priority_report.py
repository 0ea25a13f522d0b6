"""What priorities are worth: each class with them and without, of all scenarios that ran both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes

from load_tests import plots
from load_tests.report import BACKENDS, number, table
from load_tests.results import Result, runs_below

WITH, WITHOUT = "llumnix", "llumnix_base"

NUMBERS = {
    "mean e2e, s": "mean_e2el_ms",
    "mean TTFT, s": "mean_ttft_ms",
    "P99 TTFT, s": "p99_ttft_ms",
    "mean TPOT, ms": "mean_tpot_ms",
    "P99 TPOT, ms": "p99_tpot_ms",
}

COLOURS = {"high": ("#f0c3a5", "#e07b39"), "normal": ("#bcd0ee", "#1f5fd0")}
"""Without priorities, and with them."""

NOTE = (
    f"Each class without priorities ({plots.style(WITHOUT).label}) / with them, and how many times"
    " as fast that is."
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One class of one scenario at one rate, in two runs of the same trace."""

    scenario: str
    backend: str
    rate: float
    name: str
    without: Result
    with_them: Result

    def both(self, title: str) -> tuple[float, float]:
        """One of NUMBERS, without priorities and with them."""
        key, scale = NUMBERS[title], 1 if title.endswith("ms") else 1e-3
        return scale * self.without[key], scale * self.with_them[key]

    def shown(self, title: str) -> str:
        """The same for a table, and their ratio."""
        without, with_them = self.both(title)
        ratio = number(without / with_them) if with_them else "-"
        return f"{number(without)} / {number(with_them)} ({ratio})"


def write(folder: Path) -> str:
    """Writes `priorities.md` and a figure for each backend into `folder`.

    Returns the table; nothing where no scenario ran with priorities and without.
    """
    found = list(comparisons(folder))
    if not found:
        return ""
    parts = ["# With priorities and without", NOTE, gains(found)]
    for backend, of_backend in groupby(found, lambda one: one.backend):
        draw(list(of_backend), folder / f"{backend}-priorities.svg")
        parts.append(f"![{BACKENDS[backend]}]({backend}-priorities.svg)")
    (folder / "priorities.md").write_text("\n\n".join(parts) + "\n")
    return gains(found)


def comparisons(folder: Path) -> Iterator[Comparison]:
    """Of all scenarios below `folder`, by backend, scenario and rate."""
    for backend in BACKENDS:
        runs = {
            (scenario, rate, policy): result["priorities"]
            for scenario, policy, rate, result in runs_below(folder, backend)
        }
        for (scenario, rate, policy), with_them in runs.items():
            if policy == WITH:
                without = runs.get((scenario, rate, WITHOUT), {})
                for name in sorted(with_them.keys() & without.keys()):
                    yield Comparison(scenario, backend, rate, name, without[name], with_them[name])


def gains(found: Sequence[Comparison]) -> str:
    """A row for each class of each pair of runs."""
    rows = [
        [one.scenario, one.backend, f"{one.rate:g}", one.name, *map(one.shown, NUMBERS)]
        for one in found
    ]
    return table(["scenario", "backend", "req/s", "class", *NUMBERS], rows)


def draw(found: Sequence[Comparison], file: Path) -> None:
    """Two bars for each class of each pair of runs."""
    with plots.canvas(file, 1, len(NUMBERS), (16, 3)) as (figure, grid):
        for axes, title in zip(grid.flat, NUMBERS, strict=True):
            _bars(axes, found, title)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _bars(axes: Axes, found: Sequence[Comparison], title: str) -> None:
    places = list(dict.fromkeys((one.scenario, one.rate) for one in found))
    names = list(dict.fromkeys(one.name for one in found))
    width = 0.8 / (2 * len(names))
    for one in found:
        left = places.index((one.scenario, one.rate)) + 2 * width * names.index(one.name)
        for side, (height, colour, how) in enumerate(
            zip(one.both(title), COLOURS[one.name], ("without", "with"), strict=True)
        ):
            first = (one.scenario, one.rate) == places[0]
            label = f"{one.name}, {how} priorities" if first else None
            axes.bar(left + side * width, height, 0.9 * width, color=colour, label=label)
    plots.scale(axes, [height for one in found for height in one.both(title)])
    middle = width * (len(names) - 0.5)
    axes.set_xticks(
        [index + middle for index in range(len(places))],
        [f"{rate:g}/s" for _, rate in places],
        fontsize=6,
    )
    for scenario, group in groupby(enumerate(places), lambda place: place[1][0]):
        indices = [index for index, _ in group]
        centre = sum(indices) / len(indices) + middle
        below = axes.get_xaxis_transform()
        axes.text(centre, -0.12, scenario, fontsize=7, ha="center", va="top", transform=below)
    axes.set_title(title)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
