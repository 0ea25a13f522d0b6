"""Whether requests ask the Scheduler: not while it is gone, nor before it knows the fleet again."""

PAUSE_S = 0.5
"""From a failure to the next probe, and from probe to probe."""

SETTLING_S = 1.5
"""By then a Scheduler that is back has heard from every instance that is well: idle ones report
once a second.
"""


class Breaker:
    """Closed: requests ask the Scheduler. Open, from a failure on: they decide alone.

    What closes it is a probe, which asks for no request: so none ever waits to learn whether the
    Scheduler is back. The clock is the caller's, in seconds.
    """

    def __init__(self) -> None:
        self.closed = True
        self._probe_at = 0.0
        self._back_since: float | None = None

    def failed(self, now: float) -> None:
        """A consult or a probe failed, or was not answered in time."""
        self.closed = False
        self._back_since = None
        self._probe_at = now + PAUSE_S

    def wants_probe(self, now: float) -> bool:
        """Whether it is time to see if the Scheduler is back."""
        return not self.closed and now >= self._probe_at

    def answered(self, knows_all: bool, now: float) -> None:
        """A probe was answered; `knows_all`: it told of every instance that a request may go to.

        A Scheduler that was just restarted knows those that have reported since, and would send
        them everything. So it is given time, but not for ever: who stays silent hangs, or is dead.
        """
        if self._back_since is None:
            self._back_since = now
        self.closed = knows_all or now - self._back_since >= SETTLING_S
        self._probe_at = now + PAUSE_S
