"""One worker thread for blocking calls that may hang: one call in flight, a watchdog, no wait at interpreter exit.

The interpreter joins the threads of `concurrent.futures` at exit, so a device that never answers would keep a
service from ending. This thread is a daemon and nobody joins it.

Invariants:
    1. At most one call is in flight; the others wait in the order in which they came.
    2. A call that outlives its time poisons the worker: this caller, every waiting one and every later one gets
       `DeviceUnavailable`, because the thread cannot be taken back from the call.
    3. A caller that is cancelled gives up its result; the call itself ends before the next one starts.

Owner: the event loop in which the worker was made; the thread only takes calls from the queue.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from harness.errors import DeviceUnavailable

T = TypeVar("T")
_Job = tuple[Callable[[], Any], "asyncio.Future[Any]"]
_FINISH_S = 2.0


class CallThread:
    """Runs blocking calls one after the other in a daemon thread of its own.

    Args:
        name: the thread's name, also used in errors.
        timeout_s: seconds that one call may take before the worker is given up.
    """

    def __init__(self, name: str, *, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._slot = asyncio.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stopped: str | None = None
        threading.Thread(target=_serve, args=(self._jobs, self._loop), name=name, daemon=True).start()

    @property
    def usable(self) -> bool:
        """Whether further calls can be made."""
        return self._stopped is None

    async def run(self, call: Callable[[], T]) -> T:
        """Result of ``call``, made in the thread.

        Raises:
            DeviceUnavailable: the call outlived its time now or earlier, or the worker was stopped.
            Exception: whatever the call raises.

        *Cancellation:* a call that has started goes on, and its result is dropped; a waiting one is not made.
        """
        await self._slot.acquire()
        if self._stopped is not None:
            self._slot.release()
            raise DeviceUnavailable(self._stopped)
        done: asyncio.Future[Any] = self._loop.create_future()
        # The watchdog belongs to the call, not to its caller: a cancelled caller must not leave a hung call unwatched.
        watchdog = self._loop.call_later(self._timeout_s, self._give_up, done)
        done.add_done_callback(functools.partial(self._ended, watchdog))
        self._jobs.put((call, done))
        return cast(T, await asyncio.shield(done))

    async def finish(self, last: Callable[[], object], reason: str) -> None:
        """Makes one last call and ends the thread; a call in flight that hangs is left to it after two seconds.

        Args:
            last: not made when the worker was stopped before.
            reason: see `stop`.

        Raises:
            Exception: whatever the last call raises.

        *Cancellation:* the thread ends all the same.
        """
        if not self.usable:
            return
        try:
            async with asyncio.timeout(_FINISH_S) as deadline:
                await self.run(last)
        except TimeoutError:
            if not deadline.expired():
                raise
        finally:
            self.stop(reason)

    def stop(self, reason: str) -> None:
        """Ends the thread after the call in flight; later calls raise `DeviceUnavailable` with ``reason``."""
        if self._stopped is None:
            self._stopped = reason
            self._jobs.put(None)

    def _give_up(self, done: asyncio.Future[Any]) -> None:
        self.stop(f"{self._name} did not answer within {self._timeout_s:g} s; it must be opened anew")
        if not done.done():
            done.set_exception(DeviceUnavailable(self._stopped or ""))

    def _ended(self, watchdog: asyncio.TimerHandle, done: asyncio.Future[Any]) -> None:
        watchdog.cancel()
        self._slot.release()
        done.exception()  # marks it as seen: the caller may have been cancelled


def _serve(jobs: queue.SimpleQueue[_Job | None], loop: asyncio.AbstractEventLoop) -> None:
    while (job := jobs.get()) is not None:
        call, done = job
        try:
            outcome: Any = call()
            failed = False
        except Exception as error:  # the border of the thread: the caller gets it
            outcome, failed = error, True
        try:
            loop.call_soon_threadsafe(_deliver, done, outcome, failed)
        except RuntimeError:  # the loop was closed while the call hung: nobody waits any more
            return


def _deliver(done: asyncio.Future[Any], outcome: Any, failed: bool) -> None:
    if done.done():
        return
    if failed:
        done.set_exception(outcome)
    else:
        done.set_result(outcome)
