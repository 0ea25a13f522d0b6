"""What is kept of a scenario: JSON, Markdown tables, a figure."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from load_tests.chaos import plot
from load_tests.chaos.outcome import Outcome, breaks
from load_tests.chaos.pauses import Pause
from load_tests.chaos.streams import Stream
from load_tests.metrics import percentile
from load_tests.report import number, table

EXAMPLES = 20
"""Failed and wrong streams that are named."""

PAUSE_NOTE = (
    "The pause of each recovered stream at the client, from token to token. Noticed: how much of\n"
    "it the ingress did not yet know of the loss. Prefill: the TTFT of a prompt as long as prompt\n"
    "and tokens so far, on the idle fleet."
)
OTHER = "no fault of ours"


def write(outcome: Outcome, folder: Path) -> str:
    """Writes `<scenario>.json`, `.md` and `.svg`. Returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    name = outcome.scenario.name
    (folder / f"{name}.json").write_text(json.dumps(to_json(outcome), indent=1) + "\n")
    plot.draw(outcome, folder / f"{name}.svg")
    shown = to_markdown(outcome)
    (folder / f"{name}.md").write_text(f"{shown}\n\n![timeline]({name}.svg)\n")
    return shown


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Times are seconds from the first of the streams."""
    began = outcome.began
    return {
        "scenario": outcome.scenario.name,
        "seed": outcome.seed,
        "seconds": outcome.seconds,
        "broken_promises": outcome.broken(),
        **_counts(outcome),
        "failures": [
            f"{stream.ended - began:.1f} s, {stream.name}: {stream.error}"
            for stream in outcome.of("failed")[:EXAMPLES]
        ],
        "differences": [
            stream.difference(outcome.expected[stream.number])
            for stream in outcome.of("wrong")[:EXAMPLES]
        ],
        "events": [{**asdict(event), "at": event.at - began} for event in outcome.events],
        "pauses": [{**asdict(pause), "since": pause.since - began} for pause in outcome.pauses()],
        "ttft": {"calm": _ttfts(outcome.calm), "faults": _ttfts(outcome.of("right"))},
        "longest_pauses_of_others": [said for _, said in _others(outcome)[:EXAMPLES]],
        "breaks": [asdict(one) for one in breaks(outcome)],
        "growth": [asdict(one) for one in outcome.growth()],
        "looks": [{**asdict(look), "at": look.at - began} for look in outcome.looks],
        "usage": [
            {"at": at, **{role: asdict(used) for role, used in usage.items()}}
            for at, usage in outcome.usage
        ],
    }


def to_markdown(outcome: Outcome) -> str:
    """Tables, and the promises that were broken."""
    counts = _counts(outcome)
    broken = outcome.broken()
    parts = [
        f"# {outcome.scenario.name}: {outcome.scenario.about}",
        table(list(counts), [[_cell(value) for value in counts.values()]]),
        "All promises kept." if not broken else "Broken: " + "; ".join(broken) + ".",
        f"Faults: {_faults(outcome)}. Moves: {_list(outcome.moves()) or 'none'}.",
        _pauses(outcome),
        _ttft(outcome),
        _breaks(outcome),
        _growth(outcome),
    ]
    return "\n\n".join(part for part in parts if part)


def _counts(outcome: Outcome) -> dict[str, float]:
    verdicts = Counter(one.verdict(outcome.expected[one.number]) for one in outcome.streams)
    return {
        "streams": len(outcome.streams),
        "failed": verdicts["failed"],
        "wrong": verdicts["wrong"],
        "faults": len(outcome.events),
        "instances killed": outcome.instances_killed,
        "others killed": outcome.kills - outcome.instances_killed,
        "recovered streams": sum(bool(told["recoveries"]) for told in outcome.told.values()),
        "recoveries": outcome.recoveries,
        "longest time of two owners, s": outcome.excess_s,
        "leaks": len(outcome.leaks),
        "longest pause of the others, s": max((gap for gap, _ in _others(outcome)), default=0.0),
    }


def _others(outcome: Outcome) -> list[tuple[float, str]]:
    """The longest pause of each stream that was not recovered: seconds, and a line that names it;
    the longest first. Waiting for the first token is none.
    """
    found = []
    for stream in outcome.of("right"):
        gap = stream.longest_gap(since=stream.arrivals[0] + 1e-6)
        told = outcome.told.get(stream.name, {})
        if gap and not told.get("recoveries", 0):
            at = gap.since - outcome.began
            line = (
                f"{gap.seconds:.2f} s from {at:.1f} s on, {stream.name} on {told.get('replicas')}"
            )
            found.append((gap.seconds, line))
    return sorted(found, reverse=True)


def _faults(outcome: Outcome) -> str:
    return _list(Counter(event.kind for event in outcome.events)) or "none"


def _list(counts: Counter[Any]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in counts.most_common())


def _pauses(outcome: Outcome) -> str:
    pauses = outcome.pauses()
    kinds = list(dict.fromkeys(event.kind for event in outcome.events))
    rows = [
        _pause_row(kind or OTHER, found)
        for kind in (*kinds, None)
        if (found := [pause for pause in pauses if pause.kind == kind])
    ]
    headings = ["fault", "streams", "pause P50, s", "P99", "noticed P50, s", "P99"]
    shown = table([*headings, "prefill P50, s", "P99"], rows)
    return f"{PAUSE_NOTE}\n\n{shown}" if shown else ""


def _pause_row(name: str, pauses: Sequence[Pause]) -> list[str]:
    series = (
        [pause.seconds for pause in pauses],
        [pause.noticed_s for pause in pauses if pause.noticed_s is not None],
        [pause.prefill_s for pause in pauses],
    )
    numbers = [number(percentile(values, q)) for values in series for q in (50, 99)]
    return [name, str(len(pauses)), *numbers]


def _ttft(outcome: Outcome) -> str:
    ways = {"undisturbed": outcome.calm, "with faults": outcome.of("right")}
    rows = [
        [name, str(len(found)), *(number(value) for value in _ttfts(found).values())]
        for name, found in ways.items()
    ]
    return table(["TTFT", "streams", "P50, ms", "P99, ms"], rows) if outcome.calm else ""


def _ttfts(streams: Sequence[Stream]) -> dict[str, float]:
    seconds = [stream.ttft for stream in streams if not stream.error]
    return {f"p{q}_ms": 1e3 * percentile(seconds, q) for q in (50, 99)}


def _breaks(outcome: Outcome) -> str:
    rows = [
        [str(one.open), str(one.broken), str(one.refused), number(one.again_s)]
        for one in breaks(outcome)
    ]
    headings = ["streams when an ingress was killed", "broken", "new ones refused"]
    return table([*headings, "first new one after, s"], rows)


def _growth(outcome: Outcome) -> str:
    rows = [
        [one.role, one.what, number(one.before), number(one.after), "" if one.flat else "grew"]
        for one in outcome.growth()
    ]
    return table(["a process of", "what", "before", "after", ""], rows)


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value)
