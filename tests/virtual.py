"""Tests in virtual time: what waits for an hour takes no time, and is the same each time."""

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

from load_tests.simulator import virtual_time


def virtually(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make an asynchronous test one that runs on a loop with a virtual clock."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        virtual_time.run(test(*args, **kwargs))

    return run
