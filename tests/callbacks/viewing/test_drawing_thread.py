import threading
import time
from collections.abc import Hashable

import pytest

from callbacks.viewing.drawing_thread import DrawingThread


class Gate:
    """A drawing that waits to be let on, and keeps what it drew."""

    def __init__(self, finer_left: bool = False) -> None:
        self.wanted: dict[Hashable, int] = {}
        self.drawn: list[tuple[Hashable, int, bool]] = []
        self.failed: list[tuple[Hashable, BaseException]] = []
        self.finer_left = finer_left
        self.is_open = threading.Event()
        self.has_begun = threading.Event()
        self.thread = DrawingThread(self.draw, lambda key, error: self.failed.append((key, error)))

    def draw(self, key: Hashable, is_final: bool) -> bool:
        wanted = self.wanted[key]
        self.has_begun.set()
        self.is_open.wait(5)
        if wanted < 0:
            raise ZeroDivisionError("nothing to divide by")
        self.drawn.append((key, wanted, is_final))
        return self.finer_left and not is_final

    def want(self, key: Hashable, number: int) -> None:
        self.wanted[key] = number
        self.thread.mark(key)

    def rest(self) -> None:
        """Waits until all that was asked for is done."""
        self.thread.run(lambda: None).result(5)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.is_open.set()
    gate.thread.stop()


def test_the_latest_wins(gate):
    gate.want("a", 0)
    assert gate.has_begun.wait(5)
    for number in range(1, 50):  # a drag, while the first picture is drawn
        gate.want("a", number)
    gate.is_open.set()
    gate.rest()
    assert gate.drawn == [("a", 0, False), ("a", 49, False)]


def test_browsers_take_turns(gate):
    gate.want("a", 0)
    assert gate.has_begun.wait(5)
    for number in range(1, 4):
        gate.want("a", number)
        gate.want("b", number)
    gate.is_open.set()
    gate.rest()
    assert gate.drawn == [("a", 0, False), ("a", 3, False), ("b", 3, False)]


def test_a_browser_that_rests_gets_a_fine_picture(gate):
    gate.finer_left = True
    gate.is_open.set()
    gate.want("a", 1)
    deadline = time.monotonic() + 5
    while len(gate.drawn) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gate.drawn == [("a", 1, False), ("a", 1, True)]


def test_a_browser_that_moves_on_gets_no_fine_picture_of_the_past(gate):
    gate.finer_left = True
    gate.is_open.set()
    for number in range(5):
        gate.want("a", number)
        gate.rest()
    assert not any(is_final for _, _, is_final in gate.drawn)
    time.sleep(0.4)
    assert [drawn for drawn in gate.drawn if drawn[2]] == [("a", 4, True)]


def test_a_browser_that_has_gone_is_drawn_no_more(gate):
    gate.want("a", 0)
    assert gate.has_begun.wait(5)
    gate.want("b", 1)
    gate.thread.forget("b")
    gate.is_open.set()
    gate.rest()
    assert gate.drawn == [("a", 0, False)]


def test_a_broken_drawing_is_told_and_the_next_one_is_drawn(gate):
    gate.is_open.set()
    gate.want("a", -1)
    gate.rest()
    gate.want("a", 7)
    gate.rest()
    ((key, error),) = gate.failed
    assert (key, type(error)) == ("a", ZeroDivisionError)
    assert gate.drawn == [("a", 7, False)]


def test_the_error_of_other_work_goes_to_who_asked_for_it(gate):
    with pytest.raises(ZeroDivisionError):
        gate.thread.run(lambda: 1 / 0).result(5)


def test_long_work_learns_that_somebody_waits(gate):
    gate.want("a", 0)
    assert gate.has_begun.wait(5)
    assert not gate.thread.is_awaited()
    gate.want("b", 1)
    assert gate.thread.is_awaited()
    gate.is_open.set()
    gate.rest()
    assert not gate.thread.is_awaited()
    waiting = threading.Event()
    busy = gate.thread.run(lambda: waiting.wait(5))
    gate.thread.run(lambda: None)
    assert gate.thread.is_awaited()
    waiting.set()
    busy.result(5)


def test_stopping_ends_the_thread_and_what_waits(gate):
    gate.want("a", 0)
    assert gate.has_begun.wait(5)
    gate.want("b", 1)
    threading.Timer(0.05, gate.is_open.set).start()
    gate.thread.stop()
    gate.thread.mark("a")  # a browser may still move
    assert gate.drawn == [("a", 0, False)]
    assert not any(thread.name.startswith("viewer-drawing") for thread in threading.enumerate())
