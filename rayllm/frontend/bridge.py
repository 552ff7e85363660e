"""An event loop in a thread of its own, for callers that have none.

anyio's blocking portal would bring the thread and its end, but not what the rest of this is about: an interrupt, which
may come anywhere, even in the midst of handing work over, cancels that work and waits until it has ended.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from rayllm.errors import EngineDeadError

T = TypeVar("T")

CANCEL_TIMEOUT_S = 1


class Bridge:
    """Threads give work to the loop with `run`, until `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rayllm", daemon=True)
        self._thread.start()
        self._lock = threading.RLock()  # a stream that is collected meanwhile passes through it too
        self._is_closed = False

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` returns or raises, run on the loop; cancels it if this thread is interrupted.

        Raises `EngineDeadError` when the bridge is closed, before or meanwhile.
        """
        result: concurrent.futures.Future[T] = concurrent.futures.Future()
        tasks: list[asyncio.Task[T]] = []

        async def run() -> T:
            return await work()

        def start() -> None:
            tasks.append(self._loop.create_task(run()))
            tasks[0].add_done_callback(finish)

        def finish(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                result.cancel()
            elif error := task.exception():
                result.set_exception(error)
            else:
                result.set_result(task.result())

        def cancel() -> None:
            if tasks:
                tasks[0].cancel()
            else:
                result.cancel()

        try:
            self._pass_on(start)
            return result.result()
        except concurrent.futures.CancelledError:
            raise EngineDeadError("the engine was closed") from None
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        except BaseException:
            if not result.done():
                with contextlib.suppress(EngineDeadError):  # whoever closes cancels everything
                    self._pass_on(cancel)
                    # until it has ended, a generator that it runs cannot be closed
                    concurrent.futures.wait([result], CANCEL_TIMEOUT_S)
            raise

    def _pass_on(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if self._is_closed:
                raise EngineDeadError("the engine was closed")
            self._loop.call_soon_threadsafe(callback)

    def close(self, end: Callable[[], None]) -> None:
        """Refuses new work, calls `end` on the loop, waits for the work that ends with it, cancels the rest."""
        with self._lock:
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._close(end), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self, end: Callable[[], None]) -> None:
        end()
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:  # of other threads, which hear of it
            _, stuck = await asyncio.wait(tasks, timeout=CANCEL_TIMEOUT_S)
            for task in stuck:  # it waits for something else, a restart of the engine, say
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)
        await self._loop.shutdown_asyncgens()  # streams that nobody reads just now
