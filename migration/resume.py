"""The resume path of a request whose instance was lost: its tokens are known, its KV is not.

Like a move without a copy: the same snapshot, installed in the same way (design.md §1). The engine
computes the KV again, as far as its prefix cache does not have it; grammar, penalties and generator
are brought to where they were from the tokens alone.
"""

import asyncio
from functools import partial

from migration.engine_seam import EngineSeam, Reservation
from migration.peer import StepThread
from migration.snapshot import CannotMove, Snapshot


async def resume(steps: StepThread, seam: EngineSeam, snapshot: Snapshot, timeout_s: float) -> None:
    """Let the engine go on with a request. Raises CannotMove where it cannot.

    `timeout_s`: for its grammar to be compiled.
    """
    revived = await steps.run(partial(seam.revive, snapshot))
    if not await compiled(steps, seam, revived, timeout_s):
        raise CannotMove("its grammar is still being compiled")
    await steps.run(partial(seam.install, revived, snapshot))


async def compiled(
    steps: StepThread, seam: EngineSeam, reservation: Reservation, timeout_s: float
) -> bool:
    """Wait for the grammar of a request with structured output; False if it takes too long."""
    grammar = await steps.run(partial(seam.grammar, reservation))
    if grammar is None:
        return True
    await asyncio.wait([asyncio.wrap_future(grammar)], timeout=timeout_s)
    return grammar.done()
