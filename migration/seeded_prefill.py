"""A vLLM 0.32 bug on CPU: a seeded request whose prefill is chunked kills the engine.

Rows of unfinished prefills are sampled and their token thrown away; the V1 runner then rewinds
their generator by `set_offset`, which CPU generators do not have ("CPU Generator does not use
offset"). Re-prefilling a recovered request runs into it too. The remedy: those rows have no
generator for the step, so that nothing is drawn and nothing rewound; their output is discarded
anyway.
"""

from collections.abc import Callable
from typing import Any


def hide_generators_of_unfinished_prefills(runner: Any) -> None:
    """Wrap the two methods of this runner between which the generators must be hidden."""
    hidden: dict[int, Any] = {}
    sample: Callable[..., Any] = runner._sample
    bookkeep: Callable[..., Any] = runner._bookkeeping_sync

    def sample_without(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        for row in runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0]:
            if (generator := batch.generators.pop(int(row), None)) is not None:
                hidden[int(row)] = generator
        return sample(*args, **kwargs)

    def bookkeep_and_restore(*args: Any, **kwargs: Any) -> Any:
        try:
            return bookkeep(*args, **kwargs)
        finally:
            runner.input_batch.generators.update(hidden)
            hidden.clear()

    runner._sample = sample_without
    runner._bookkeeping_sync = bookkeep_and_restore
