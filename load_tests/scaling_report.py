"""What auto-scaling costs and saves: instances against P99 TTFT, in all variants of a scenario."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from load_tests import plots
from load_tests.report import BACKENDS, LLUMNIX, RIVAL, number, table
from load_tests.results import Result, runs_below

NOTE = (
    "Instances: those that start, run or drain, mean over time; hours: all of them together. A"
    " scenario's variants have other thresholds of auto-scaling."
)
EQUAL_NOTE = (
    f"Of each run of {plots.style(LLUMNIX).label}: the instance-hours with which"
    f" {plots.style(RIVAL).label} has the same P99 TTFT, between two of its runs."
)


@dataclass(frozen=True, slots=True)
class Cost:
    """One run whose instances were scaled."""

    backend: str
    scenario: str
    variant: str
    rate: float
    policy: str
    result: Result

    @property
    def place(self) -> tuple[str, str, float]:
        """What it can be compared in."""
        return self.backend, self.scenario, self.rate

    @property
    def instances(self) -> float:
        """Mean over time."""
        return self.result["mean_instances"]

    @property
    def hours(self) -> float:
        """Of all instances together."""
        return self.result["instance_seconds"] / 3600

    @property
    def p99_s(self) -> float:
        """Of the TTFT."""
        return self.result["p99_ttft_ms"] / 1000


def write(folder: Path) -> str:
    """Writes `scaling.md` and its figures into `folder`.

    Returns the table of savings; nothing where no instances were scaled.
    """
    found = sorted(costs(folder), key=lambda cost: (cost.place, cost.policy, cost.instances))
    if not found:
        return ""
    parts = ["# Auto-scaling", NOTE, cost_table(found)]
    saved = saving_table(found)
    parts += ["## At equal P99 TTFT", EQUAL_NOTE, saved] if saved else []
    for (backend, scenario), of in groupby(found, lambda cost: cost.place[:2]):
        name = f"{backend}-{scenario}-scaling.svg"
        draw(list(of), folder / name)
        parts.append(f"![{scenario}, {BACKENDS[backend]}]({name})")
    (folder / "scaling.md").write_text("\n\n".join(parts) + "\n")
    return saved


def costs(folder: Path) -> Iterator[Cost]:
    """Of all scenarios below `folder`."""
    for backend in BACKENDS:
        for name, policy, rate, result in runs_below(folder, backend):
            scenario, _, variant = name.partition("@")
            if result["completed"] and len(set(present(result))) > 1:
                yield Cost(backend, scenario, variant, rate, policy, result)


def present(result: Result) -> list[int]:
    """Instances over time."""
    shares = zip(*result["timeline"]["used"].values(), strict=True)
    return [sum(share is not None for share in of_all) for of_all in shares]


def hours_at(costs: Sequence[Cost], p99_s: float) -> float | None:
    """Instance-hours with which a policy has this P99 TTFT; None where it never is as fast.

    Between two runs the logarithm of the P99 is taken for linear. A run that is slower than a
    cheaper one is left out.
    """
    better: list[Cost] = []
    for cost in sorted(costs, key=lambda cost: cost.hours):
        if not better or cost.p99_s < better[-1].p99_s:
            better.append(cost)
    if better and better[0].p99_s <= p99_s:
        return better[0].hours
    for slow, fast in pairwise(better):
        if fast.p99_s <= p99_s:
            share = math.log(slow.p99_s / p99_s) / math.log(slow.p99_s / fast.p99_s)
            return slow.hours + share * (fast.hours - slow.hours)
    return None


def cost_table(found: Sequence[Cost]) -> str:
    """A row for each run."""
    rows = [
        [
            *(cost.scenario, cost.backend, f"{cost.rate:g}", cost.variant or "-"),
            *(plots.style(cost.policy).label, number(cost.instances)),
            number(cost.hours),
            number(cost.p99_s),
            number(cost.result["mean_ttft_ms"] / 1000),
            number(cost.result["p99_tpot_ms"]),
        ]
        for cost in found
    ]
    numbers = ["instances", "hours", "P99 TTFT, s", "mean TTFT, s", "P99 TPOT, ms"]
    return table(["scenario", "backend", "req/s", "variant", "policy", *numbers], rows)


def saving_table(found: Sequence[Cost]) -> str:
    """A row for each run of Llumnix at whose place the rival ran, too."""
    rows = []
    for ours in found:
        theirs = [one for one in found if one.place == ours.place and one.policy == RIVAL]
        if ours.policy != LLUMNIX or not theirs:
            continue
        needed = hours_at(theirs, ours.p99_s)
        most = max(one.hours for one in theirs)
        rows.append(
            [
                *(ours.scenario, ours.backend, f"{ours.rate:g}", ours.variant or "-"),
                number(ours.p99_s),
                number(ours.hours),
                f"over {number(most)}" if needed is None else number(needed),
                "" if needed is None else number(100 * (1 - ours.hours / needed)),
            ]
        )
    labels = [plots.style(policy).label for policy in (LLUMNIX, RIVAL)]
    heads = ["P99 TTFT, s", *(f"hours, {label}" for label in labels), "fewer, %"]
    return table(["scenario", "backend", "req/s", "variant", *heads], rows)


def draw(found: Sequence[Cost], file: Path) -> None:
    """P99 TTFT against instances, and the instances over time of one variant; a row for a rate."""
    rates = sorted({cost.rate for cost in found})
    size = (12, 2.8 * len(rates))
    with plots.canvas(file, len(rates), 2, size) as (figure, grid):
        for (left, right), rate in zip(grid, rates, strict=True):
            here = [cost for cost in found if cost.rate == rate]
            _curves(left, here)
            _over_time(right, here)
            left.set_title(f"P99 TTFT, s; {rate:g} requests/s")
        grid[-1, 0].set_xlabel("instances, mean over time")
        grid[-1, 1].set_xlabel("time, s")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4)


def _curves(axes: Axes, found: Sequence[Cost]) -> None:
    for policy in plots.policies((cost.policy, cost.rate) for cost in found):
        look = plots.style(policy)
        of = [cost for cost in found if cost.policy == policy]
        line = axes.plot(
            [cost.instances for cost in of],
            [cost.p99_s for cost in of],
            color=look.colour,
            marker=look.marker,
            label=look.label,
        )
        line[0].set(markersize=4, linewidth=look.width)
    plots.scale(axes, [cost.p99_s for cost in found])
    axes.grid(axis="y")


def _over_time(axes: Axes, found: Sequence[Cost]) -> None:
    """Of the variant in the middle of Llumnix's, or of the others where it did not run."""
    ours = [cost for cost in found if cost.policy == LLUMNIX] or found
    variant = ours[len(ours) // 2].variant
    for cost in found:
        if cost.variant == variant:
            look, timeline = plots.style(cost.policy), cost.result["timeline"]
            axes.step(
                timeline["seconds"], present(cost.result), where="post", color=look.colour, lw=1
            )
    axes.set_ylim(0, None)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"instances over time, variant {variant}" if variant else "instances over time")
    axes.margins(x=0)
    axes.grid(axis="y")
