"""Gate: lets requests in or turns them away, counts and logs that."""

import logging
import time
from collections.abc import Mapping

from ray.util.metrics import Counter

from app.admission import Admission
from app.config import PriorityClass
from app.refusals import Answer, Refusal
from migration.snapshot import Submission

LOG_EVERY_S = 1.0

logger = logging.getLogger("ray.serve.llumnix")


class Gate:
    """The admission of one ingress."""

    def __init__(self, classes: Mapping[str, PriorityClass]) -> None:
        self._admission = Admission(classes)
        self._refused = Counter(
            "llumnix_refused_total",
            "Requests that were not let in, or that no instance took.",
            ("class", "reason"),
        )
        self._unlogged = 0
        self._logged_at = float("-inf")

    def admit(self, submission: Submission, answer: Answer, patient: bool) -> Refusal | None:
        """Let a request in, or say why not. What one HTTP request asks for is let in as a whole.

        `patient`: it is less urgent than its class.
        """
        if answer.refusal is not None:
            return answer.refusal
        # A prompt of embeddings has no tokens; it counts, or the number of such had no bound.
        tokens = max(1, submission.prompt_tokens)
        name, now = submission.priority_class, time.monotonic()
        if not answer.admitted and (full := self._admission.check(name, tokens, now)):
            self.turned_away(name, full.reason, full.detail)
            return Refusal(429, full.detail, full.retry_after_s)
        answer.admitted = True
        self._admission.arrived(submission.request_id, name, tokens, now, patient)
        return None

    def left(self, request_id: str) -> None:
        """It got its first token or ended without one; later calls do nothing."""
        self._admission.left(request_id)

    def turned_away(self, priority_class: str, reason: str, why: str) -> None:
        """Count a request that is refused, and log one line a second at most."""
        self._refused.inc(1, {"class": priority_class, "reason": reason})
        self._unlogged += 1
        now = time.monotonic()
        if now - self._logged_at >= LOG_EVERY_S:
            logger.warning("requests refused: %d; the last one: %s", self._unlogged, why)
            self._unlogged, self._logged_at = 0, now
