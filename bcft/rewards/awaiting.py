"""Asynchronous functions of users, awaited from ordinary code, also where a loop runs already, as in a notebook."""

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a call returns a coroutine: of a function, of an object's `__call__`, or of a partial of one."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def start(awaitable: Awaitable[T]) -> "Future[T]":
    """Await in the loop of this process, which has a thread of its own; return the future of the result.

    It is one loop for all calls, because a client that a user's module keeps belongs to the loop of its first call.
    """

    async def wait() -> T:
        return await awaitable

    return asyncio.run_coroutine_threadsafe(wait(), _loop(os.getpid()))


@functools.lru_cache(maxsize=1)
def _loop(process: int) -> asyncio.AbstractEventLoop:  # noqa: ARG001 - a forked process does not have the thread
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="bcft-rewards", daemon=True).start()
    return loop
