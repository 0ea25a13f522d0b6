"""The figures of a report, as SVG. A policy has the same colour and marker in all of them."""

from bisect import bisect
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
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
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

FREE, USED, WAITING, MOVE = "#eef0f3", "#bcc6d4", "#e39a8f", "#10305f"
HEIGHT = 0.85
"""Of the lane of an instance; lanes are 1 apart."""
MOVES_SHOWN = 80
"""More lines than these cannot be told apart."""

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


def preemptions(cells: Cells, file: Path) -> None:
    """How many requests were preempted, and what that cost them, a bar for each policy."""
    with canvas(file, 1, 3, (12, 2.9)) as (figure, grid):
        for axes, (title, of) in zip(grid.flat, LOSSES.items(), strict=True):
            _bars(axes, {place: of(result) for place, result in cells.items()})
            axes.set_title(title)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        figure.supxlabel("requests/s", fontsize=9)


def memory(results: Sequence[Result], file: Path) -> None:
    """The memory of each instance over time with the moves between them, results side by side."""
    window = _window(results)
    height = 1 + max(max(lanes(result["timeline"]).values()) for result in results)
    with canvas(file, 1, len(results), (12, 1.3 + 0.36 * height)) as (figure, grid):
        for axes, result in zip(grid.flat, results, strict=True):
            _fill(axes, result["timeline"])
            _moves(axes, result, window)
            axes.set_title(
                f"{style(result['policy']).label}, {result['request_rate']:g} requests/s"
            )
            axes.set(xlabel="time, s", xlim=window)
        grid[0, 0].set_ylabel("instance")
        figure.legend(handles=_key(), loc="outside upper right", ncols=4)


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


def _window(results: Sequence[Result]) -> tuple[float, float]:
    """All of the time, or as much of it around the first result's longest queues as can be read."""
    times = sorted(move[0] for result in results for move in result["moves"])
    if len(times) <= MOVES_SHOWN:
        return 0.0, max(result["timeline"]["seconds"][-1] for result in results)
    middle = bisect(times, _longest_queues(results[0]["timeline"]))
    first = min(max(0, middle - MOVES_SHOWN // 2), len(times) - MOVES_SHOWN)
    return times[first], times[first + MOVES_SHOWN - 1]


def _longest_queues(timeline: Mapping[str, Any]) -> float:
    instances = zip(*timeline["waiting"].values(), strict=True)
    queues = [sum(filter(None, waiting)) for waiting in instances]
    return timeline["seconds"][queues.index(max(queues))]


def lanes(timeline: Mapping[str, Any]) -> dict[str, int]:
    """The lane of each instance; one that has left makes room for the next that comes."""
    found: dict[str, int] = {}
    ends: list[int] = []
    for name, shares in timeline["used"].items():
        there = [index for index, share in enumerate(shares) if share is not None]
        lane = next((lane for lane, end in enumerate(ends) if end < there[0]), len(ends))
        ends[lane : lane + 1] = [there[-1]]
        found[name] = lane
    return found


def _fill(axes: Axes, timeline: Mapping[str, Any]) -> None:
    """The lane of each instance, as far as its memory is."""
    lane_of = lanes(timeline)
    for name, shares in timeline["used"].items():
        lane = lane_of[name]
        used = [lane + HEIGHT * (share or 0) for share in shares]
        there = [lane if share is None else lane + HEIGHT for share in shares]
        queues = zip(used, timeline["waiting"][name], strict=True)
        waiting = [top if queue else lane for top, queue in queues]
        for tops, colour in ((there, FREE), (used, USED), (waiting, WAITING)):
            areas = axes.fill_between(timeline["seconds"], lane, tops, step="post", color=colour)
            areas.set(linewidth=0, rasterized=True)  # an image is smaller than so many corners
    ticks = range(1 + max(lane_of.values()))
    axes.set_yticks([lane + HEIGHT / 2 for lane in ticks], [str(lane + 1) for lane in ticks])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.05, len(ticks))


def _moves(axes: Axes, result: Result, window: tuple[float, float]) -> None:
    middle = {name: lane + HEIGHT / 2 for name, lane in lanes(result["timeline"]).items()}
    for at, source, destination, *_ in result["moves"]:
        if window[0] <= at <= window[1] and {source, destination} <= middle.keys():
            ends = [middle[source], middle[destination]]
            axes.plot([at, at], ends, color=MOVE, lw=0.8, marker="o", ms=3, markevery=[1])


def _key() -> list[Any]:
    return [
        Patch(color=FREE, label="free memory"),
        Patch(color=USED, label="in use"),
        Patch(color=WAITING, label="in use while requests wait there"),
        Line2D([], [], color=MOVE, lw=1, marker="o", ms=3, label="a move (dot: where to)"),
    ]
