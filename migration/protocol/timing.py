"""The protocol's waits and bounds, beside the one that users set (`migration.timeout_s`)."""

SETTLE_TRIES = 3
"""How often a destination that did not answer COMMIT is asked what became of it."""

SETTLE_PAUSE_S = 0.1

ATTACH_S = 10.0
"""How long an ingress may need to attach to the new owner, once it knows."""


def orphan_s(timeout_s: float) -> float:
    """Seconds after which a request that no ingress asks for is dropped.

    The source may have waited for COMMIT's answer, then for those to all its questions, before it
    could tell the ingress that the request moved.
    """
    return 2 * timeout_s + SETTLE_TRIES * SETTLE_PAUSE_S + ATTACH_S


PER_PAIR = 1
"""Moves at once from one instance to another. They share a link: a request that is suspended for
its last blocks would wait for the first thousand of another."""

REMEMBERED = 4096
"""Ended moves whose end a destination remembers, so that a late or doubled message finds out."""
