"""The figure of a scenario: tokens and faults over time, pauses by fault, memory over time."""

from collections import Counter
from pathlib import Path

from matplotlib.axes import Axes

from load_tests import plots
from load_tests.chaos.faults import Kind
from load_tests.chaos.outcome import Outcome
from load_tests.chaos.processes import INGRESS, REPLICA, SCHEDULER

COLOURS: dict[Kind, str] = {
    "kill": "#c0392b",
    "source": "#e07b39",
    "destination": "#d9a520",
    "both ends": "#7b241c",
    "short hang": "#7fa8e8",
    "long hang": "#1f5fd0",
    "burst": "#4f9d69",
    "scheduler": "#8a8a8a",
    "ingress": "#b08bbf",
}
ROLES = {REPLICA: "#1f5fd0", INGRESS: "#e07b39", SCHEDULER: "#8a8a8a"}
TOKENS, PREFILL = "#10305f", "#bcc6d4"


def draw(outcome: Outcome, file: Path) -> None:
    """As SVG."""
    with plots.canvas(file, 3, 1, (12, 7)) as (_, grid):
        tokens, pauses, memory = grid.flat
        _tokens(tokens, outcome)
        _pauses(pauses, outcome)
        _memory(memory, outcome)


def _tokens(axes: Axes, outcome: Outcome) -> None:
    """Of all streams, each second, and a line for each fault."""
    counts = Counter(
        int(at - outcome.began) for stream in outcome.streams for at in stream.arrivals
    )
    seconds = range(max(counts, default=0) + 1)
    rates = [counts[second] for second in seconds]
    axes.fill_between(seconds, rates, step="post", color=TOKENS, alpha=0.35, lw=0)
    named: set[str] = set()
    for event in outcome.events:
        label = None if event.kind in named else event.kind
        axes.axvline(event.at - outcome.began, color=COLOURS[event.kind], lw=1.2, label=label)
        named.add(event.kind)
    axes.set(title="tokens/s, and faults", xlabel="time, s", ylim=(0, None))
    axes.margins(x=0)
    if named:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _pauses(axes: Axes, outcome: Outcome) -> None:
    """A dot for each recovered stream, and in grey the prefill that it needed."""
    pauses = [pause for pause in outcome.pauses() if pause.kind]
    kinds = [kind for kind in COLOURS if any(pause.kind == kind for pause in pauses)]
    for lane, kind in enumerate(kinds):
        found = [pause for pause in pauses if pause.kind == kind]
        seconds = [pause.seconds for pause in found]
        prefills = [pause.prefill_s for pause in found]
        axes.plot(
            seconds, [lane] * len(found), marker="o", ls="", ms=4, alpha=0.6, color=COLOURS[kind]
        )
        axes.plot(prefills, [lane + 0.3] * len(found), marker="|", ls="", ms=6, color=PREFILL)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(title="pause of each recovered stream (grey: one prefill of its length)")
    axes.set_xlabel("seconds")
    if pauses:
        axes.set_xscale("log")
    axes.grid(axis="x")
    axes.margins(y=0.2)


def _memory(axes: Axes, outcome: Outcome) -> None:
    """Of a process of each of our deployments, in the mean."""
    for role, colour in ROLES.items():
        there = [(at, usage[role]) for at, usage in outcome.usage if role in usage]
        means = [used.rss_mib / used.processes for _, used in there]
        axes.plot([at for at, _ in there], means, color=colour, label=role)
    axes.set(title="memory of a process, MiB", xlabel="time, s", ylim=(0, None))
    axes.margins(x=0)
    axes.grid(axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
