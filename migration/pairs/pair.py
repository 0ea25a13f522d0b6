"""What the pairs have in common: how their two ends find each other, and what they do not do."""

import time
from typing import Any

import torch
from ray.experimental import internal_kv
from ray.util.collective.collective_group.base_collective_group import BaseGroup

PAIR_TIMEOUT_S = 20.0
"""Longest that a join or one chunk may take. Gloo closes a pair that times out: it is then remade.
"""


class Pair(BaseGroup):
    """Two processes, of which rank 0 tells rank 1 through Ray where to meet."""

    def settle(self) -> None:
        """Wait for what the current stream was given; on CPUs there is none."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def allreduce(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("a pair only sends and receives")

    barrier = reduce = allgather = broadcast = reducescatter = allreduce

    def _key(self, what: str = "pair") -> str:
        return f"llumnix:{what}:{self.group_name}"

    def _await(self, key: str) -> bytes:
        """The other may still be on its way: the two join at the same time."""
        deadline = time.monotonic() + PAIR_TIMEOUT_S
        while time.monotonic() < deadline:
            if found := internal_kv._internal_kv_get(key):
                return found
            time.sleep(0.005)
        raise TimeoutError(f"the other end of {self.group_name} did not show up")
