"""From the results of all runs to a report for each scenario: Markdown tables and SVG figures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from load_tests import memory_plot, plots
from load_tests.outcome import REFUSED
from load_tests.results import Cells, Result, load_all, scenarios_below

LLUMNIX, RIVAL = "llumnix", "infaas"

BACKENDS = {"fleet": "Fleet", "simulator": "Simulator"}

Column = Callable[[Result], str]


def _seconds(key: str) -> Column:
    return lambda result: number(result[key] / 1000)


def _milliseconds(key: str) -> Column:
    return lambda result: number(result[key])


def _count(key: str) -> Column:
    return lambda result: f"{result[key]:,}"


def _attempts(outcome: str) -> Column:
    return lambda result: f"{result['migrations'][outcome]:,}"


def _fact(name: str) -> Column:
    return lambda result: number(result["facts"][name]) if name in result["facts"] else ""


def _refused(result: Result) -> str:
    return f"{sum(error.startswith(REFUSED) for error in result['errors']):,}"


LATENCIES: dict[str, Column] = {
    "TTFT mean, s": _seconds("mean_ttft_ms"),
    "TTFT P50, s": _seconds("p50_ttft_ms"),
    "TTFT P99, s": _seconds("p99_ttft_ms"),
    "TPOT mean, ms": _milliseconds("mean_tpot_ms"),
    "TPOT P50, ms": _milliseconds("p50_tpot_ms"),
    "TPOT P99, ms": _milliseconds("p99_tpot_ms"),
    "e2e mean, s": _seconds("mean_e2el_ms"),
    "e2e P99, s": _seconds("p99_e2el_ms"),
}

MEMORY: dict[str, Column] = {
    "queue mean, s": _seconds("mean_queue_ms"),
    "queue P99, s": _seconds("p99_queue_ms"),
    "fragmented, %": lambda result: number(100 * result["fragmentation"]),
    "preempted, %": lambda result: number(plots.preempted_percent(result)),
    "loss mean, s": _seconds("mean_preemption_loss_ms"),
    "loss P99, s": _seconds("p99_preemption_loss_ms"),
    "loss of the preempted, s": _seconds("mean_preempted_loss_ms"),
}

MOVES: dict[str, Column] = {
    "moves": _attempts("completed"),
    "refused": _attempts("refused"),
    "aborted": _attempts("aborted"),
    "moved requests": _count("moved_requests"),
    "preempted after a move": _count("preempted_after_move"),
    "downtime mean, ms": _milliseconds("mean_migration_downtime_ms"),
    "downtime P99, ms": _milliseconds("p99_migration_downtime_ms"),
}

RATIOS = {
    "P99 TTFT": "p99_ttft_ms",
    "mean TTFT": "mean_ttft_ms",
    "P99 TPOT": "p99_tpot_ms",
    "mean TPOT": "mean_tpot_ms",
    "P99 e2e": "p99_e2el_ms",
    "preemption loss": "mean_preemption_loss_ms",
}

COMPARED = {
    "TTFT P50, ms": "p50_ttft_ms",
    "TTFT P99, ms": "p99_ttft_ms",
    "TPOT P50, ms": "p50_tpot_ms",
    "TPOT P99, ms": "p99_tpot_ms",
}

WORDS = ("scenario", "backend", "policy", "baseline", "class", "variant")
"""Columns that are not numbers."""

RATIO_NOTE = "A baseline's number over that of Llumnix at the same rate: above 1, Llumnix leads."
MEMORY_NOTE = (
    "Fragmented: the share of the cluster's memory that heads of line wait for where they are while"
    " it is free in pieces elsewhere, mean over time. Loss: how long requests stood still after"
    " preemptions, over all that completed and over the preempted ones."
)
COMPARE_NOTE = "Simulator / fleet (difference, in percent of the fleet)."


def write(folder: Path) -> str:
    """Writes `report.md` and its figures beside the results of each scenario below `folder`.

    And into `folder` a figure for each backend: P99 TTFT in seconds against the rate, of each
    scenario in which Llumnix ran at several. Returns a table of each scenario's ratios at its knee.
    """
    rows: list[list[str]] = []
    tails: dict[str, dict[str, dict[tuple[str, float], float]]] = {}
    for scenario in scenarios_below(folder):
        found = {name: cells for name in BACKENDS if (cells := load_all(scenario, name))}
        if found:
            (scenario / "report.md").write_text(_report(scenario, found))
        for name, cells in found.items():
            at_knee = {place: r for place, r in cells.items() if place[1] == knee(cells)}
            rows += [[scenario.name, name, *row] for row in _ratio_rows(at_knee)]
            if len({rate for policy, rate in cells if policy == LLUMNIX}) > 1:
                of_each = {place: result["p99_ttft_ms"] / 1000 for place, result in cells.items()}
                tails.setdefault(name, {})[scenario.name] = of_each
    for name, of_scenarios in tails.items():
        plots.against_rate(of_scenarios, "TTFT, P99, s", folder / f"{name}-rates.svg")
    return table(["scenario", "backend", "req/s", "baseline", *RATIOS], rows)


def knee(cells: Cells) -> float | None:
    """The rate at which Llumnix betters INFaaS++' P99 TTFT most; None where they never meet.

    A run in which nothing completed counts as none: its latencies are those of nothing.
    """
    gains = {
        rate: cells[RIVAL, rate]["p99_ttft_ms"] / max(1e-3, result["p99_ttft_ms"])
        for (policy, rate), result in cells.items()
        if policy == LLUMNIX and (RIVAL, rate) in cells and result["completed"]
    }
    return max(gains, key=lambda rate: gains[rate], default=None)


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 or not value else f"{value:#.3g}".rstrip(".")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; empty without rows."""
    rule = [":--" if heading in WORDS else "--:" for heading in headings]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]
    return "\n".join(lines) if rows else ""


def run_table(cells: Cells, columns: Mapping[str, Column]) -> str:
    """A row for each run."""
    rows = [[*_named(place), *_row(cells[place], columns)] for place in _places(cells)]
    return table(["req/s", "policy", *columns], rows)


def priority_table(cells: Cells) -> str:
    """A row for each class of each run that has several."""
    rows = [
        [*_named(place), name, f"{numbers['completed']:,}", *_row(numbers, LATENCIES)]
        for place in _places(cells)
        for name, numbers in cells[place]["priorities"].items()
    ]
    return table(["req/s", "policy", "class", "completed", *LATENCIES], rows)


def fact_table(cells: Cells) -> str:
    """A row for each run, a column for each fact that any of them has."""
    facts = sorted({fact for result in cells.values() for fact in result["facts"]})
    return run_table(cells, {fact: _fact(fact) for fact in facts}) if facts else ""


def ratio_table(cells: Cells) -> str:
    """A row for each baseline at each rate at which Llumnix ran, too."""
    return table(["req/s", "baseline", *RATIOS], _ratio_rows(cells))


def compare(simulated: Cells, real: Cells) -> str:
    """Simulator and fleet and their relative difference, a row for each run that both have."""
    rows = [
        [*_named(at), *(_beside(simulated[at][key], real[at][key]) for key in COMPARED.values())]
        for at in _places(real)
        if at in simulated
    ]
    return table(["req/s", "policy", *COMPARED], rows)


def _places(cells: Cells) -> list[tuple[str, float]]:
    """The lower rates first, at each rate the policies in their order."""
    order = plots.policies(cells)
    return sorted(cells, key=lambda place: (place[1], order.index(place[0])))


def _named(place: tuple[str, float]) -> list[str]:
    policy, rate = place
    label = plots.style(policy).label
    return [f"{rate:g}", f"**{label}**" if policy == LLUMNIX else label]


def _row(result: Result, columns: Mapping[str, Column]) -> list[str]:
    return [column(result) for column in columns.values()]


def _ratio_rows(cells: Cells) -> list[list[str]]:
    return [
        [*_named((policy, rate)), *(_ratio(cells, policy, rate, key) for key in RATIOS.values())]
        for policy, rate in _places(cells)
        if policy != LLUMNIX and (LLUMNIX, rate) in cells and cells[LLUMNIX, rate]["completed"]
    ]


def _ratio(cells: Cells, policy: str, rate: float, key: str) -> str:
    theirs, ours = cells[policy, rate][key], cells[LLUMNIX, rate][key]
    return number(theirs / ours) if ours else "∞" if theirs else "-"


def _beside(simulated: float, real: float) -> str:
    difference = f"{100 * (simulated / real - 1):+z.1f} %" if real else "-"
    return f"{number(simulated)} / {number(real)} ({difference})"


def _report(folder: Path, found: Mapping[str, Cells]) -> str:
    parts = [f"# {folder.name}"]
    for backend, cells in found.items():
        parts += [f"## {BACKENDS[backend]}", *_section(cells, folder, backend)]
    if shown := compare(found.get("simulator", {}), found.get("fleet", {})):
        parts += ["## Simulator beside fleet", COMPARE_NOTE, shown]
    return "\n\n".join(parts) + "\n"


def _section(cells: Cells, folder: Path, backend: str) -> list[str]:
    """Of one backend: headings, tables and links to the figures, which it draws."""
    plots.latency(cells, folder / f"{backend}-latency.svg")
    plots.preemptions(cells, folder / f"{backend}-preemptions.svg")
    moving = {place: r for place, r in cells.items() if r["migrations"]["by_reason"]}
    parts = [
        [_setting(cells), f"![Latency]({backend}-latency.svg)"],
        [run_table(cells, LATENCIES | {"failed": _count("failed"), "refused": _refused})],
        ["### Baselines over Llumnix", RATIO_NOTE, ratio_table(cells)],
        ["### Memory", MEMORY_NOTE, run_table(cells, MEMORY)],
        [f"![Preemptions]({backend}-preemptions.svg)", *_at_knee(cells, folder, backend)],
        ["### Moves", run_table(moving, MOVES)],
        ["### Priority classes", priority_table(cells)],
        ["### Further facts", fact_table(cells)],
    ]
    return [text for part in parts if all(part) for text in part]


def _setting(cells: Cells) -> str:
    settings = {(r["instances"], r["num_prompts"]): r["model_id"] for r in cells.values()}
    runs = (
        f"{instances:,} instances of {settings[instances, requests]}, {requests:,} requests"
        for instances, requests in sorted(settings)
    )
    return f"{'; '.join(runs)} in each run."


def _at_knee(cells: Cells, folder: Path, backend: str) -> list[str]:
    rate = knee(cells)
    if rate is None:
        return []
    results = [cells[RIVAL, rate], cells[LLUMNIX, rate]]
    plots.fragmentation(results, folder / f"{backend}-fragmentation.svg")
    memory_plot.draw(results, folder / f"{backend}-memory.svg")
    return [
        f"At {rate:g} requests/s, where Llumnix gains most in P99 TTFT:",
        f"![Fragmentation]({backend}-fragmentation.svg)",
        f"![Memory and moves]({backend}-memory.svg)",
    ]
