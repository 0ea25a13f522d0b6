"""The ingress' journal: the requests that run, with their tokens so far, and those that ended.

So a request can be continued whatever happens to its instance.
"""

from array import array
from collections import OrderedDict
from dataclasses import replace

from vllm.v1.engine import EngineCoreOutput

from app.entry import Entry

ENDED_KEPT = 1000
"""Requests that ended and are still shown (design.md §5)."""


class Journal:
    """Running requests by their ids inside the engines, and all that are shown by their public one.

    `max_tokens`: of prompts and outputs, kept to continue requests. A request that would exceed it
    is served as well, but lost with its instance.
    """

    def __init__(self, max_tokens: int) -> None:
        self._live: dict[str, Entry] = {}
        self._ended: OrderedDict[str, Entry] = OrderedDict()
        self._names: dict[str, Entry] = {}
        self._max_tokens = max_tokens
        self._kept_tokens = 0

    def get(self, request_id: str) -> Entry | None:
        """The running request by vLLM's id for it, or any that it had inside the engines."""
        return self._live.get(request_id)

    def present(self, request_id: str) -> Entry | None:
        """The running request that is called so inside the engines now, not before a loss."""
        entry = self._live.get(request_id)
        return entry if entry and entry.submission.request_id == request_id else None

    def known(self, request_id: str) -> Entry | None:
        """Any that ever was called so: word of its last move may come after its end."""
        return self._live.get(request_id) or self._ended.get(request_id)

    def accept(self, entry: Entry, first: int, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        """The outputs of a running request that can be delivered now that this one arrived."""
        before = entry.output_tokens
        ready = entry.accept(first, output)
        if entry.kept:
            self._kept_tokens += entry.output_tokens - before
            if self._kept_tokens > self._max_tokens:
                self._forget(entry)
        return ready

    def renew(self, entry: Entry) -> None:
        """Give a request another id inside the engines: it will be submitted again.

        So nothing that its lost instance still says is heard, should that come back to life.
        """
        entry.submissions += 1
        request_id = f"{entry.request_id}~{entry.submissions}"
        entry.submission = replace(entry.submission, request_id=request_id)
        entry.held, entry.gap_since = {}, None
        entry.owners, entry.strangers = [], set()
        self._live[request_id] = entry

    def live(self) -> list[Entry]:
        """All running requests."""
        return [entry for name, entry in self._live.items() if name == entry.request_id]

    def shown(self) -> list[Entry]:
        """Running requests, then the last that ended, newest first."""
        return [*self.live(), *reversed(self._ended.values())]

    def find(self, name: str) -> Entry | None:
        """By X-Request-Id or the id in the response; of several, the running or last one."""
        named = self._names.get(name)
        if named is None or not named.ended:
            return named
        return next((entry for entry in self._live.values() if name in entry.aliases), named)

    def free_public_id(self, wanted: str) -> str:
        """`wanted`, or with a number where a running request (a sibling of n > 1) has it."""
        first = entry = self._names.get(wanted)
        public_id = wanted
        while first is not None and entry is not None and not entry.ended:
            first.siblings += 1  # counted there: they may be thousands
            public_id = f"{wanted}.{first.siblings}"
            entry = self._names.get(public_id)
        return public_id

    def open(self, entry: Entry) -> None:
        """A new request."""
        self._live[entry.request_id] = entry
        self._kept_tokens += entry.prompt_size
        if self._kept_tokens > self._max_tokens:
            self._forget(entry)
        for name in entry.aliases:
            known = self._names.get(name)
            if known is None or known.ended:
                self._names[name] = entry
        self._names[entry.submission.public_id] = entry

    def close(self, entry: Entry) -> None:
        """The request ended; keep it for a while, without its tokens."""
        if self._live.pop(entry.request_id, None) is None:
            return
        for number in range(2, entry.submissions + 1):
            del self._live[f"{entry.request_id}~{number}"]
        if entry.kept:
            self._forget(entry)
        entry.strip()
        entry.held = {}
        entry.over.set()
        self._ended[entry.submission.request_id] = entry
        while len(self._ended) > ENDED_KEPT:
            _, oldest = self._ended.popitem(last=False)
            for name in (oldest.submission.public_id, *oldest.aliases):
                if self._names.get(name) is oldest:
                    del self._names[name]

    def _forget(self, entry: Entry) -> None:
        """Keep its tokens no longer, nor its prompt once a replica has that."""
        entry.kept, entry.tokens = False, array("i")
        if entry.replicas:
            entry.strip()
        self._kept_tokens -= entry.prompt_size + entry.output_tokens
