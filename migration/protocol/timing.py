"""The protocol's waits and bounds, beside the one that users set (`migration.timeout_s`)."""

SETTLE_TRIES = 3
"""How often a destination that did not answer COMMIT is asked what became of it."""

SETTLE_PAUSE_S = 0.1

PER_PAIR = 1
"""Moves at once from one instance to another. They share a link: a request that is suspended for
its last blocks would wait for the first thousand of another."""

REMEMBERED = 4096
"""Ended moves whose end a destination remembers, so that a late or doubled message finds out."""
