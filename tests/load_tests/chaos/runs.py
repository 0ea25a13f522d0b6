"""Small chaos runs whose numbers can be worked out in one's head. They begin at 100 s."""

from array import array

from load_tests.chaos.faults import Event
from load_tests.chaos.outcome import Outcome
from load_tests.chaos.pauses import Prefills
from load_tests.chaos.processes import INGRESS, REPLICA, SCHEDULER, Usage
from load_tests.chaos.scenarios import SCENARIOS
from load_tests.chaos.streams import Stream
from load_tests.chaos.watch import Look

BEGAN = 100.0
PREFILLS = Prefills((100, 200), (0.1, 0.3))


def stream(*arrivals, name="chaos-0", ids=None, started=0.0, error="", end="length", open_=False):
    """Of a prompt of 100; a token at each of these seconds."""
    return Stream(
        name,
        number=0,
        prompt_tokens=100,
        started=BEGAN + started,
        ended=0.0 if open_ else BEGAN + max((started, *arrivals)),
        arrivals=array("d", [BEGAN + at for at in arrivals]),
        token_ids=array("i", ids or range(len(arrivals))),
        finish_reason=end,
        error=error,
    )


def event(at, kind="kill", *victims, hang_s=0.0):
    return Event(BEGAN + at, kind, victims, hang_s)


def told(*replicas, recoveries=0, recovered_ms=0.0, moves=()):
    """What the admin API says of a request."""
    migrations = [{"outcome": outcome} for outcome in moves]
    recovered = {"recoveries": recoveries, "recovered_ms": recovered_ms}
    return {"replicas": list(replicas), "migrations": migrations, **recovered}


def look(at, held, running=3):
    """While two streams are open."""
    return Look(BEGAN + at, 2, held, running)


def usage(at, rss_mib=100.0, replicas=2, **more):
    """Of `replicas` instances of so much memory each, a Scheduler and an ingress."""
    each = {"rss_mib": rss_mib, "fds": 50, "threads": 20, "sockets": 10, **more}
    all_replicas = Usage(replicas, **{key: replicas * value for key, value in each.items()})
    return at, {REPLICA: all_replicas, SCHEDULER: Usage(1, **each), INGRESS: Usage(1, **each)}


def outcome(name="kills-emulated", streams=(), events=(), told=None, **more):
    """Of a scenario that asks for no kills. Each request says 0, 1, 2 undisturbed."""
    facts = {
        "scenario": SCENARIOS[name].scaled(streams=0, minutes=0),
        "seed": 0,
        "began": BEGAN,
        "seconds": 60.0,
        "expected": [stream(1.0, 2.0, 3.0)],
        "calm": [],
        "looks": [],
        "usage": [],
        "prefills": PREFILLS,
        "leaks": [],
    }
    return Outcome(**facts | more, streams=list(streams), events=list(events), told=told or {})
