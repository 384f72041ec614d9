"""The call thread: order, cancellation, and what a call that never returns does to the others."""

from __future__ import annotations

import asyncio
import threading

import pytest

from harness.errors import DeviceFault, DeviceUnavailable
from harness.worker import CallThread


class Pause:
    """A call that says when it has started and returns when it is told to."""

    def __init__(self, result: int = 0) -> None:
        self.started = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._go = threading.Event()
        self._result = result

    def __call__(self) -> int:
        self._loop.call_soon_threadsafe(self.started.set)
        self._go.wait(10)
        return self._result

    def end(self) -> None:
        self._go.set()


async def make(timeout_s: float = 10) -> CallThread:
    return CallThread("test device", timeout_s=timeout_s)


async def test_calls_are_made_one_by_one_in_order() -> None:
    """Fifty calls at once are made in the order in which they came, and never two at a time."""
    worker, running, order = await make(), threading.Semaphore(1), list[int]()

    def call(number: int) -> int:
        assert running.acquire(blocking=False), "two calls at once"
        order.append(number)
        running.release()
        return number

    results = await asyncio.gather(*(worker.run(lambda n=n: call(n)) for n in range(50)))  # type: ignore[misc]
    assert results == order == list(range(50))
    worker.stop("end")


async def test_error_of_a_call_reaches_its_caller_only() -> None:
    """A call that raises gives its own caller that error; the next call is not affected."""
    worker = await make()

    def fail() -> None:
        raise DeviceFault("no", response_code=0x101)

    with pytest.raises(DeviceFault, match="no"):
        await worker.run(fail)
    assert await worker.run(lambda: 5) == 5
    worker.stop("end")


async def test_cancelled_caller_does_not_let_the_next_call_overtake() -> None:
    """After its caller was cancelled a call still runs to its end before the next one starts."""
    worker, first, done = await make(), Pause(), list[str]()
    caller = asyncio.create_task(worker.run(first))
    await first.started.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    following = asyncio.create_task(worker.run(lambda: done.append("second")))
    await asyncio.sleep(0)
    assert not done
    first.end()
    async with asyncio.timeout(5):
        await following
    assert done == ["second"]
    worker.stop("end")


async def test_waiting_call_whose_caller_is_cancelled_is_never_made() -> None:
    """A call that had not started when its caller was cancelled does not happen."""
    worker, first, made = await make(), Pause(), list[str]()
    running = asyncio.create_task(worker.run(first))
    await first.started.wait()
    waiting = asyncio.create_task(worker.run(lambda: made.append("waiting")))
    await asyncio.sleep(0)
    waiting.cancel()
    first.end()
    async with asyncio.timeout(5):
        await running
        await worker.run(lambda: None)
    assert not made
    worker.stop("end")


@pytest.mark.parametrize("cancel_first", [False, True])
async def test_hung_call_gives_the_worker_up(cancel_first: bool) -> None:
    """A call that outlives its time fails all: itself, those that wait and every later one, even if its caller left."""
    worker, hung = await make(timeout_s=0.05), Pause()
    caller = asyncio.create_task(worker.run(hung))
    await hung.started.wait()
    waiting = asyncio.create_task(worker.run(lambda: 1))
    if cancel_first:
        caller.cancel()
    async with asyncio.timeout(5):
        with pytest.raises((DeviceUnavailable, asyncio.CancelledError)):
            await caller
        with pytest.raises(DeviceUnavailable, match=r"did not answer within 0.05 s"):
            await waiting
        with pytest.raises(DeviceUnavailable, match="opened anew"):
            await worker.run(lambda: 1)
    assert not worker.usable
    hung.end()


async def test_late_result_of_a_hung_call_changes_nothing() -> None:
    """When the hung call returns after all, nobody gets its result and nothing is raised."""
    worker, hung, problems = await make(timeout_s=0.05), Pause(7), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    with pytest.raises(DeviceUnavailable):
        await worker.run(hung)
    hung.end()
    thread = next(thread for thread in threading.enumerate() if thread.name == "test device")
    await asyncio.to_thread(thread.join, 5)
    await asyncio.sleep(0)
    assert not thread.is_alive()
    assert not problems


async def test_stopped_worker_refuses_with_the_reason() -> None:
    """After `stop` every call gets the stated reason, and the thread ends."""
    worker = await make()
    thread = await worker.run(threading.current_thread)
    worker.stop("closed by the test")
    with pytest.raises(DeviceUnavailable, match="closed by the test"):
        await worker.run(lambda: 1)
    await asyncio.to_thread(thread.join, 5)
    assert not thread.is_alive()


def test_thread_does_not_hold_up_the_interpreter() -> None:
    """The thread is a daemon: an interpreter with a hung call can end."""

    async def check() -> bool:
        worker = await make()
        result = await worker.run(lambda: threading.current_thread().daemon)
        worker.stop("end")
        return result

    assert asyncio.run(check())


async def test_a_last_call_behind_one_that_hangs_is_given_up() -> None:
    """Closing ends although the call in flight never does; afterwards nothing can be called."""
    worker = CallThread("a device", timeout_s=60)
    entered, release = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        release.wait(60)

    hanging = asyncio.create_task(worker.run(hang))
    await asyncio.to_thread(entered.wait, 30)
    closed = []
    async with asyncio.timeout(30):
        await worker.finish(lambda: closed.append(True), "closed")
    assert (closed, worker.usable) == ([], False)
    release.set()
    await hanging
    with pytest.raises(DeviceUnavailable, match="closed"):
        await worker.run(lambda: None)
