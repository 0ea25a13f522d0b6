"""A deployment handle without Serve."""

import asyncio
from collections.abc import Callable
from typing import Any


class FakeHandle:
    """Calls `methods[name](replica, *args)`; `replica` is the one that the call is pinned to."""

    def __init__(self, methods: dict[str, Callable[..., Any]], **options: Any) -> None:
        self._methods = methods
        self._options = options

    def options(self, **options: Any) -> "FakeHandle":
        return FakeHandle(self._methods, **{**self._options, **options})

    def remote(self, *args: Any) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(self._call(args))

    async def _call(self, args: tuple[Any, ...]) -> Any:
        method = self._methods[self._options["method_name"]]
        result = method(self._options.get("session_id"), *args)
        return await result if asyncio.iscoroutine(result) else result
