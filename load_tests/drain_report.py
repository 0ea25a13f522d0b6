"""The results of load_tests.drain: what a log says of drains, numbers, JSON, Markdown tables."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deployments.emulated.profile import Profile
from load_tests.client import Record
from load_tests.metrics import percentile
from load_tests.servers import ServerFailed

STOPPED = re.compile(r"(\w+): Serve stops it, (\d+) requests to hand over")
DRAINED = re.compile(r"(\w+): drained in ([\d.]+) s, (\d+) requests moved with (\d+) KV blocks")
DASHBOARD = re.compile(r"dashboard at (http://[\w.:]+)")
COLOUR = re.compile(r"\x1b\[\d*m")

DRAINS = (
    "| event | | instance | requests | moved | KV blocks | transfer, s | drain, s |\n"
    "| :-- | :-- | :-- | --: | --: | --: | --: | --: |"
)
PHASES = (
    "| event | | requests | failed | wrong tokens | longest gap, ms | TTFT P99, ms | done after |\n"
    "| :-- | :-- | --: | --: | --: | --: | --: | --: |"
)
NOTE = (
    "Requests: those that the instance held when Serve stopped it. Transfer: all KV blocks that\n"
    "left, one after the other over one link. Drain: until it held no request. In brackets:\n"
    "the same requests undisturbed."
)


@dataclass(frozen=True, slots=True)
class Drain:
    """An instance that Serve stopped. `seconds`: None where it was never empty."""

    replica_id: str
    requests: int
    seconds: float | None
    moved: int = 0
    blocks: int = 0

    def transfer_s(self, profile: Profile) -> float:
        """Seconds that the blocks which left it take over one link."""
        return profile.copy_time_s(self.blocks * profile.block_size) if self.blocks else 0.0


def drains(log: str) -> list[Drain]:
    """In the order in which the instances were stopped."""
    ended = {name: rest for name, *rest in DRAINED.findall(log)}
    return [
        Drain(name, int(requests), float(ended[name][0]), int(ended[name][1]), int(ended[name][2]))
        if name in ended
        else Drain(name, int(requests), None)
        for name, requests in STOPPED.findall(log)
    ]


def dashboard(log: str) -> str:
    """Where Ray's dashboard is, which takes new configurations. Raises ServerFailed."""
    found = DASHBOARD.search(COLOUR.sub("", log))
    if found is None:
        raise ServerFailed("the log does not say where Ray's dashboard is")
    return found[1]


@dataclass(frozen=True, slots=True)
class Phase:
    """One event under load. Gap: the longest time between two tokens of one stream.

    `done_s`: from the deployment until the fleet was what was asked for. `undisturbed_`: the same
    requests before.
    """

    event: str
    done_s: float
    drains: list[Drain]
    requests: int
    errors: list[str]
    wrong: int
    gap_ms: float
    undisturbed_gap_ms: float
    ttft_p99_ms: float
    undisturbed_ttft_p99_ms: float

    @classmethod
    def of(
        cls,
        event: str,
        done_s: float,
        drains: Sequence[Drain],
        records: Sequence[Record],
        undisturbed: Sequence[Record],
    ) -> "Phase":
        """`undisturbed`: records of the same requests, and maybe of more that follow."""
        before = undisturbed[: len(records)]
        pairs = zip(records, before, strict=True)
        return cls(
            event,
            done_s,
            list(drains),
            len(records),
            [record.error for record in records if record.error],
            sum(not one.error and one.token_ids != other.token_ids for one, other in pairs),
            _longest_gap_ms(records),
            _longest_gap_ms(before),
            _ttft_p99_ms(records),
            _ttft_p99_ms(before),
        )


def _longest_gap_ms(records: Sequence[Record]) -> float:
    return 1e3 * max((gap for record in records for gap in record.itl), default=0.0)


def _ttft_p99_ms(records: Sequence[Record]) -> float:
    return 1e3 * percentile([record.ttft for record in records if not record.error], 99)


def progress(phase: Phase) -> str:
    """One line."""
    seconds = ", ".join(_seconds(drain.seconds) for drain in phase.drains)
    return (
        f"{phase.event}: {phase.requests} requests, {len(phase.errors)} failed, {phase.wrong} with"
        f" wrong tokens; drained in {seconds} s; longest gap {phase.gap_ms:.0f} ms"
    )


def write(
    ways: Mapping[str, Sequence[Phase]],
    undisturbed: Sequence[Record],
    profile: Profile,
    folder: Path,
) -> str:
    """Writes drain.json and .md. Returns the tables. `ways`: with migration, and without."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {way: [asdict(phase) for phase in phases] for way, phases in ways.items()}
    (folder / "drain.json").write_text(json.dumps(content, indent=1) + "\n")
    longest = max(record.latency for record in undisturbed)
    shown = "\n".join(
        [
            DRAINS,
            *(
                drain_row(p.event, w, d, profile)
                for w, ps in ways.items()
                for p in ps
                for d in p.drains
            ),
            f"\n{NOTE} The longest of them took {longest:.0f} s.\n",
            PHASES,
            *(phase_row(way, phase) for way, phases in ways.items() for phase in phases),
        ]
    )
    (folder / "drain.md").write_text(shown + "\n")
    return shown


def drain_row(event: str, way: str, drain: Drain, profile: Profile) -> str:
    """Of one instance."""
    return (
        f"| {event} | {way} | {drain.replica_id} | {drain.requests} | {drain.moved}"
        f" | {drain.blocks} | {drain.transfer_s(profile):.2f} | {_seconds(drain.seconds)} |"
    )


def phase_row(way: str, phase: Phase) -> str:
    """Of all its requests."""
    return (
        f"| {phase.event} | {way} | {phase.requests} | {len(phase.errors)} | {phase.wrong}"
        f" | {phase.gap_ms:,.0f} ({phase.undisturbed_gap_ms:,.0f})"
        f" | {phase.ttft_p99_ms:,.0f} ({phase.undisturbed_ttft_p99_ms:,.0f})"
        f" | {phase.done_s:.0f} s |"
    )


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.2f}"
