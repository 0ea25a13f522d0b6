"""Small runs whose numbers can be worked out in one's head."""

from array import array

from deployments.policy.load import InstanceLoad
from load_tests.outcome import Run, Sample, Served
from migration.snapshot import MigrationRecord


def request(name="a", *tokens, arrival=0.0, **more):
    """One that asked for as many tokens as there are, and got them at those times."""
    of_trace = {"input_tokens": 10, "output_tokens": len(tokens)}
    return Served(name, arrival, **of_trace, tokens=array("d", tokens), **more)


def load(name="x", used=0, demand=0, total=100, state="running", **more):
    """`demand`: blocks that the head of line waits for."""
    return InstanceLoad(
        name, state, blocks_total=total, blocks_used=used, head_of_line_blocks=demand, **more
    )


def move(at=1.0, source="x", destination="y", outcome="completed", reason="balance", **more):
    """Of 7 blocks."""
    numbers = {"blocks": 7, "downtime_ms": 20.0, **more}
    return MigrationRecord("a", source, destination, reason, outcome, at=at, **numbers)


def a_run(served=(), samples=(), moves=(), **more):
    """Of ten seconds."""
    about = {"scenario": "m-m", "policy": "llumnix", "rate": 7.5, "backend": "fleet"} | more
    return Run(
        **{"instances": 2, "model_id": "emulated", "duration": 10.0} | about,
        served=list(served),
        samples=list(samples),
        moves=list(moves),
    )


def of_ttft(ttft, step=0.1, **more):
    """Requests of 3 tokens that all wait `ttft` seconds and then `step` for each further token."""
    times = (ttft, ttft + step, ttft + 2 * step)
    two = (load("x", used=50, waiting=1), load("y", used=25))
    samples = [Sample(float(second), two) for second in range(10)]
    return a_run([request(f"r{n}", *times) for n in range(4)], samples, **more)
