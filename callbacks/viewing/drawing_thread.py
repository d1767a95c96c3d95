"""One thread that draws for all browsers: always what each of them asked for last, coarse first."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)

REST_S = 0.15
"""A browser that asked for nothing new for this long gets its fine picture, seconds."""


class DrawingThread(Generic[Key]):
    """Draws in a thread of its own, so that neither browsers nor training wait for a picture.

    ``mark`` says that a browser's picture is out of date; what it wants is looked up when its turn comes, so whatever
    it wanted in between is skipped. A picture is drawn coarse at once, and fine when the browser rests. ``run`` takes
    other work that must not go on beside a drawing. Turns are taken in the order in which they were asked for.

    Args:
        draw: ``draw(key, is_final)`` draws for a browser and returns whether a finer picture is left to draw.
        failed: ``failed(key, error)`` is told what broke a drawing; the thread goes on.
    """

    def __init__(self, draw: Callable[[Key, bool], bool], failed: Callable[[Key, BaseException], None]) -> None:
        self._draw, self._failed = draw, failed
        self._lock = threading.RLock()
        self._waiting: set[Key] = set()  # browsers whose coarse picture is in the queue
        self._resting: dict[Key, threading.Timer] = {}
        self._num_queued = 0
        self._is_stopped = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="viewer-drawing")

    def mark(self, key: Key) -> None:
        """Notes that a browser's picture is out of date."""
        with self._lock:
            self._stop_resting(key)
            if key in self._waiting or self._is_stopped:
                return
            self._waiting.add(key)
            self._submit(key, False)

    def forget(self, key: Key) -> None:
        """Draws no more for a browser that has gone."""
        with self._lock:
            self._waiting.discard(key)
            self._stop_resting(key)

    def run(self, task: Callable[[], Result]) -> "Future[Result]":
        """Runs other work between two drawings; its result or its error is in the future.

        Raises:
            RuntimeError: If the thread was stopped.
        """

        def counted() -> Result:
            self._count(-1)
            return task()

        self._count(1)
        return self._executor.submit(counted)

    def is_awaited(self) -> bool:
        """Returns whether somebody waits for a turn: what is long and can go on later should stop here."""
        return self._num_queued > 0

    def stop(self) -> None:
        """Ends the thread after what it is at; what waits is cancelled."""
        with self._lock:
            self._is_stopped = True
            self._waiting.clear()
            for key in list(self._resting):
                self._stop_resting(key)
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _submit(self, key: Key, is_final: bool) -> None:
        def ended(turn: Future) -> None:
            error = None if turn.cancelled() else turn.exception()
            if error is not None:
                self._failed(key, error)

        self._count(1)
        self._executor.submit(self._take_turn, key, is_final).add_done_callback(ended)

    def _take_turn(self, key: Key, is_final: bool) -> None:
        self._count(-1)
        with self._lock:
            # A coarse picture is due if it is still wanted; a fine one if nothing newer is.
            if is_final == (key in self._waiting):
                return
            self._waiting.discard(key)
        if not self._draw(key, is_final):
            return
        with self._lock:
            if key not in self._waiting and not self._is_stopped:
                self._stop_resting(key)
                self._resting[key] = threading.Timer(REST_S, self._refine, (key,))
                self._resting[key].daemon = True
                self._resting[key].start()

    def _refine(self, key: Key) -> None:
        with self._lock:
            if self._resting.pop(key, None) is not None and not self._is_stopped:
                self._submit(key, True)

    def _count(self, change: int) -> None:
        with self._lock:
            self._num_queued += change

    def _stop_resting(self, key: Key) -> None:
        timer = self._resting.pop(key, None)
        if timer is not None:
            timer.cancel()
