"""The figures of a report, as SVG. A policy has the same colour and marker in all of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from load_tests.results import Cells, Result


@dataclass(frozen=True, slots=True)
class Style:
    """How a policy is called and drawn."""

    label: str
    colour: str
    marker: str
    width: float = 1.3


STYLES = {
    "llumnix": Style("Llumnix", "#1f5fd0", "o", 2.4),
    "llumnix_base": Style("Llumnix-base", "#7fa8e8", "P"),
    "infaas": Style("INFaaS++", "#e07b39", "s"),
    "round_robin": Style("round robin", "#8a8a8a", "^"),
    "queue": Style("shortest queue", "#4f9d69", "D"),
    "power_of_two": Style("power of two", "#b08bbf", "v"),
}

PANELS = {
    "mean_ttft_ms": "TTFT, mean, s",
    "p50_ttft_ms": "TTFT, P50, s",
    "p99_ttft_ms": "TTFT, P99, s",
    "p99_e2el_ms": "e2e, P99, s",
    "mean_tpot_ms": "TPOT, mean, ms",
    "p50_tpot_ms": "TPOT, P50, ms",
    "p99_tpot_ms": "TPOT, P99, ms",
}


def preempted_percent(result: Result) -> float:
    """Requests that were preempted at least once, of all."""
    return 100 * result["preempted_requests"] / max(1, result["num_prompts"])


LOSSES: dict[str, Callable[[Result], float]] = {
    "preempted requests, %": preempted_percent,
    "loss, mean of all requests, s": lambda r: r["mean_preemption_loss_ms"] / 1000,
    "loss, mean of the preempted, s": lambda r: r["mean_preempted_loss_ms"] / 1000,
}

RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}


def style(policy: str) -> Style:
    """One that is not known is dark grey."""
    return STYLES.get(policy, Style(policy, "#444444", "X"))


def policies(cells: Iterable[tuple[str, float]]) -> list[str]:
    """Those that ran: Llumnix first, the known before the others."""
    order = list(STYLES)
    found = {policy for policy, _ in cells}
    return sorted(
        found, key=lambda name: (order.index(name) if name in order else len(order), name)
    )


def latency(cells: Cells, file: Path) -> None:
    """Latencies against the rate, a line for each policy."""
    with canvas(file, 2, 4, (12, 5.2)) as (figure, grid):
        for axes, (key, title) in zip(grid.flat, PANELS.items(), strict=False):
            scale = 1 if title.endswith("ms") else 1e-3
            _lines(axes, {place: scale * result[key] for place, result in cells.items()})
            axes.set_title(title)
        grid[-1, -1].axis("off")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        grid[-1, -1].legend(handles, labels, loc="center", fontsize=10, labelspacing=0.9)
        figure.supxlabel("requests/s", fontsize=9)


def against_rate(
    values: Mapping[str, Mapping[tuple[str, float], float]], what: str, file: Path
) -> None:
    """`what`, in a panel for each name, with a line for each policy over the rates."""
    columns = min(4, len(values))
    rows = -(-len(values) // columns)
    with canvas(file, rows, columns, (12, 0.5 + 2.4 * rows)) as (figure, grid):
        for axes in grid.flat[len(values) :]:
            axes.axis("off")
        for axes, (name, cells) in zip(grid.flat, values.items(), strict=False):
            _lines(axes, cells)
            axes.set_title(name)
        lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
        figure.legend(lines.values(), lines, loc="outside right center")
        figure.supxlabel("requests/s", fontsize=9)
        figure.supylabel(what, fontsize=9)


def preemptions(cells: Cells, file: Path) -> None:
    """How many requests were preempted, and what that cost them, a bar for each policy."""
    with canvas(file, 1, 3, (12, 2.9)) as (figure, grid):
        for axes, (title, of) in zip(grid.flat, LOSSES.items(), strict=True):
            _bars(axes, {place: of(result) for place, result in cells.items()})
            axes.set_title(title)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        figure.supxlabel("requests/s", fontsize=9)


def fragmentation(results: Sequence[Result], file: Path) -> None:
    """Over time, all results in one panel."""
    with canvas(file, 1, 1, (12, 2.6)) as (_, grid):
        axes = grid[0, 0]
        for result in results:
            look, timeline = style(result["policy"]), result["timeline"]
            percents = [100 * share for share in timeline["fragmentation"]]
            label = f"{look.label}, mean {100 * result['fragmentation']:.1f} %"
            seconds = timeline["seconds"]
            axes.fill_between(seconds, percents, step="post", color=look.colour, alpha=0.25, lw=0)
            axes.step(seconds, percents, where="post", color=look.colour, lw=1, label=label)
        axes.set(xlabel="time, s", ylim=(0, None), title="fragmented memory, % of the cluster's")
        axes.margins(x=0)
        axes.grid(axis="y")
        axes.legend(loc="upper right", ncols=len(results))


@contextmanager
def canvas(
    file: Path, rows: int, columns: int, size: tuple[float, float]
) -> Iterator[tuple[Figure, Any]]:
    """Axes to draw on, which become a file in the end. `size` is in inches."""
    with pyplot.rc_context(RC):
        figure, grid = pyplot.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        yield figure, grid
        figure.savefig(file, dpi=200)
        pyplot.close(figure)


def _lines(axes: Axes, values: Mapping[tuple[str, float], float]) -> None:
    for policy in policies(values):
        look = style(policy)
        points = [(rate, value) for (name, rate), value in values.items() if name == policy]
        line = axes.plot(
            *zip(*points, strict=True), color=look.colour, marker=look.marker, label=look.label
        )
        line[0].set(markersize=4, linewidth=look.width, zorder=2 + look.width)
    scale(axes, list(values.values()))
    axes.grid(axis="y")
    rates = sorted({rate for _, rate in values})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])


def scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the values span a decade, else from 0."""
    low, high = min(values), max(values)
    if low <= 0 or high < 10 * low:
        axes.set_ylim(0, 1.08 * high or 1)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _bars(axes: Axes, values: Mapping[tuple[str, float], float]) -> None:
    names, rates = policies(values), sorted({rate for _, rate in values})
    width = 0.8 / len(names)
    for side, policy in enumerate(names):
        look = style(policy)
        places = [index + width * (side - (len(names) - 1) / 2) for index in range(len(rates))]
        heights = [values.get((policy, rate), 0.0) for rate in rates]
        axes.bar(places, heights, 0.9 * width, color=look.colour, label=look.label)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.grid(axis="y")
    axes.set_axisbelow(True)
