"""The memory of each instance over time, with the moves between them drawn in, as SVG."""

from bisect import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from load_tests.plots import canvas, style
from load_tests.results import Result

FREE, USED, WAITING, MOVE = "#eef0f3", "#bcc6d4", "#e39a8f", "#10305f"
HEIGHT = 0.85
"""Of the lane of an instance; lanes are 1 apart."""
MOVES_SHOWN = 80
"""More lines than these cannot be told apart."""


def draw(results: Sequence[Result], file: Path) -> None:
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
