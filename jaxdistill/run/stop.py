"""Signals that ask a run to stop: after the first one it finishes its step and saves; a second one stops it at once.

Other commands have nothing to save, and end by an exception that lets them remove what they had begun.
"""

import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FrameType

from jaxdistill import processes
from jaxdistill.console import say_at_once

EXIT_CODE = processes.GOES_ON
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Interrupted(Exception):
    """A signal asked the run to stop, and the run saved a checkpoint; the message says where it goes on."""


class Stop:
    """What signals asked for."""

    def __init__(self) -> None:
        self.asked = ""  # the name of the first signal that the run is to obey after its step
        self.defers = False  # whether there are steps to save: without any, the first signal ends the process as well

    def arrived(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.asked:
            _end(f"{name}: stopped at once; the same command goes on from the last checkpoint", 128 + number)
        elif self.defers:
            self.asked = name
            say_at_once(
                f"{name}: the run saves a checkpoint after this step and stops; a second signal stops it at once"
            )
        else:
            _end(f"{name}: stopped with nothing to save; the same command goes on from here", EXIT_CODE)


@contextmanager
def listening() -> Iterator[Stop]:
    """Obeys signals while the block runs.

    A thread reads their numbers from a pipe. A handler of Python's would wait for the end of a compilation, and an
    exception that it raises is lost where an import or a callback swallows exceptions. Signals that are ignored stay
    ignored, as nohup wants. In a thread other than the main one, which may not set handlers, nothing is listened to.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    read, write = os.pipe()
    os.set_blocking(write, False)
    reader = threading.Thread(target=_read, args=(read, stop, numbers), daemon=True)
    reader.start()
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda number, frame: None) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(write)  # ends the thread
        reader.join()


_AGAIN = 2.0  # seconds in which a command that Ctrl-C ends has cleaned up


@contextmanager
def interruptible(line: str) -> Iterator[None]:
    """Raises KeyboardInterrupt in the block after Ctrl-C, again and again until the block has ended.

    Python raises it once, in whatever code runs then: an exception in a callback of the garbage collector, as jax has
    one, or in a destructor is printed and lost. While a library is being imported the process ends at once, as its
    initialisation in C may not survive an exception, and nothing has been begun. Where another handler is set, or the
    signal is ignored, and in a thread other than the main one, nothing changes.

    Args:
      line: what is said where the process ends at once.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def arrived(number: int, frame: FrameType | None) -> None:
        if _imports(frame):
            say_at_once(line)
            os._exit(128 + signal.SIGINT)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, arrived) for number in (signal.SIGINT, signal.SIGALRM)}
    shown = sys.unraisablehook
    sys.unraisablehook = lambda lost: None if lost.exc_type is KeyboardInterrupt else shown(lost)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = shown


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported where the main thread stands."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _read(pipe: int, stop: Stop, numbers: Collection[int]) -> None:
    with open(pipe, "rb", buffering=0) as arriving:
        while byte := arriving.read(1):
            if byte[0] in numbers:
                stop.arrived(byte[0])


def _end(line: str, code: int) -> None:
    say_at_once(line)
    processes.announce(EXIT_CODE, line)
    os._exit(code)  # at once, without the clean-up of Python and its libraries, which may wait for the main thread
