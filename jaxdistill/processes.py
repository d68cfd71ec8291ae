"""Several processes that compute together, on one host or many: they find each other, take turns, and end together.

jax.distributed connects them. One process, the coordinator, keeps a table of texts by key, through which the others
learn what it did and why one of them failed. A process that ends is noticed by the sockets that it leaves, and one that
is silent by its missing heartbeats.
"""

import atexit
import ctypes
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any

from jaxdistill import __version__, console
from jaxdistill.cluster import Cluster, check_cluster, completed, own_devices
from jaxdistill.errors import UserError

# EX_TEMPFAIL of sysexits.h, "try again later": a supervisor starts the same command again, on all hosts, which goes on.
GOES_ON = 75
_FAILED = "jaxdistill/failed"
_GRACE = 3.0  # seconds for which a process that failed stays, so that the others can read why
_LOOK = 1.0  # seconds between looks whether another process failed
_OWN_END = 1.0  # seconds that a process has to end by itself, as where all have found the same error


def join(cluster: Cluster) -> None:
    """Connects this process with the others, where there are others; before anything asks JAX for its devices.

    Raises:
      UserError: values that do not go together; the others cannot be reached in cluster.timeout seconds.
    """
    if _client() is not None:
        return
    cluster = completed(cluster)
    if cluster.processes == 1 or cluster[:3] == Cluster()[:3]:
        return
    check_cluster(cluster)
    _wait_for_coordinator(cluster)
    _connect(cluster)
    if not is_first():
        console.quiet()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process


def is_first() -> bool:
    """Whether this process is the one that makes folders, writes files and speaks."""
    return _client() is None or _state().process_id == 0


def count() -> int:
    """The number of processes."""
    return 1 if _client() is None else _state().num_processes


def wait(name: str) -> None:
    """Returns once all processes have come to the place in the program that `name` is of.

    Where one of them is lost, this process ends.
    """
    if (client := _client()) is not None:
        client.wait_at_barrier(f"jaxdistill/{name}/{_visits(name)}", _LONG)


def gathered(name: str, text: str) -> list[str]:
    """The texts that the processes have at this place of the program, in their order."""
    if (client := _client()) is None:
        return [text]
    key = f"jaxdistill/{name}/{_visits(name)}"
    client.key_value_set(f"{key}/{_state().process_id}", text)
    return [client.blocking_key_value_get(f"{key}/{number}", _LONG) for number in range(count())]


def check_same(what: str, values: Mapping[str, Any], *, advice: str) -> None:
    """Checks that all processes have the same values here, before one of them waits for what another does not do.

    Args:
      what: names this place of the program.
      values: by name; of all that differ, the first is told.

    Raises:
      UserError: in all processes; names a value, and two processes that differ in it.
    """
    if count() == 1:
        return
    told = json.dumps({"host": socket.gethostname(), "values": {name: str(value) for name, value in values.items()}})
    first, *others = map(json.loads, gathered(what, told))
    for number, other in enumerate(others, 1):
        for name in {**first["values"], **other["values"]}:
            one, two = (of["values"].get(name, "not there") for of in (first, other))
            if one != two:
                raise UserError(
                    f"{name} is {one} in process 0 on {first['host']}, and {two} in process {number} on "
                    f"{other['host']}; {advice}"
                )


_DECIDING = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy", "grain")


@functools.cache
def versions() -> Mapping[str, str]:
    """The versions of the packages that decide on programs, numbers and files, to compare by `check_same`."""
    installed = {"jaxdistill": __version__} | {name: version(name) for name in _DECIDING}
    return {f"the version of {name}": value for name, value in installed.items()}


def announce(code: int, line: str) -> None:
    """Tells the other processes that this one is about to end, so that they end as well, with the same code."""
    if (client := _client()) is None:
        return
    global _own_code
    who = {"process": _state().process_id, "host": socket.gethostname(), "code": code, "line": line}
    _own_code = code
    _leaving.set()
    with suppress(Exception):  # another was first, or the coordinator is gone
        client.key_value_set(_FAILED, json.dumps(who))
    if is_first():  # the coordinator is part of this process
        time.sleep(_GRACE)


def leave(code: int, line: str) -> int:
    """The exit code of a command that failed. One of several processes ends here: to shut down would be to wait."""
    if _client() is not None:
        announce(code, line)
        sys.stdout.flush()
        os._exit(code)
    return code


def loss_in(error: BaseException) -> tuple[int, str] | None:
    """(exit code, line) where an error in a computation says that another process is gone; else None.

    Where that process has said why it ended, this process ends here, with the same line.
    """
    if _client() is None or not any(sign in str(error) for sign in _SIGNS):
        return None
    time.sleep(_GRACE + _OWN_END)
    return GOES_ON, LOSS


LOSS = (
    "another process, or its host, is gone; what was saved stays, and the same command on all hosts goes on from the "
    "last checkpoint"
)
# Of the libraries that carry arrays between processes, and of JAX's coordination service.
_SIGNS = ("Gloo", "gloo", "NCCL", "UNAVAILABLE", "oordination", "heartbeat")

_LONG = 7 * 24 * 3_600_000  # milliseconds; a process that is lost ends the wait, and one that works may take its time
_leaving = threading.Event()  # set when this process has said its own last line
_own_code = 0  # with which it then exits
_visited: dict[str, int] = {}


def _visits(name: str) -> int:
    """How often this process was at a place: keys and barriers are used once, and all processes come in one order."""
    _visited[name] = _visited.get(name, 0) + 1
    return _visited[name]


def _state() -> Any:
    """What JAX knows of the other processes; None where it is not imported yet, which would take seconds.

    JAX has no public way to exchange a text between processes; orbax reads the same object.
    """
    return getattr(sys.modules.get("jax._src.distributed"), "global_state", None)


def _client() -> Any:
    """The connection to the coordinator; None where this process is alone."""
    return getattr(_state(), "client", None)


def _wait_for_coordinator(cluster: Cluster) -> None:
    """Raises UserError where the address cannot be used. JAX itself would end the process with pages of C++."""
    host, _, port = cluster.coordinator.rpartition(":")
    if cluster.process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise UserError(
                f"--coordinator {cluster.coordinator}: process 0 cannot listen there ({error.strerror}); name a port "
                "that is free on its host"
            ) from None
        return
    deadline, reason = time.monotonic() + cluster.timeout, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error) or reason
            time.sleep(min(left, 0.2))
    raise UserError(
        f"--coordinator {cluster.coordinator} cannot be reached from process {cluster.process_id} on "
        f"{socket.gethostname()} in {cluster.timeout} s ({reason}); start process 0 there, or name its address"
    )


def _connect(cluster: Cluster) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # counts on CPUs alone
    # JAX would take SIGTERM away from run/stop.py, which has the processes agree on a step as well.
    jax.config.update("jax_enable_preemption_service", False)
    ids = f"0 to {(cluster.processes or 1) - 1}"
    with _libraries_silenced() as terminal:
        _at_abort(
            terminal,
            f"error: the {cluster.processes} processes did not come together at {cluster.coordinator} in "
            f"{cluster.timeout} s: start each of the process ids {ids} once, with this address",
            2,
        )
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process_id,
            initialization_timeout=cluster.timeout,
            heartbeat_timeout_seconds=cluster.timeout,
            shutdown_timeout_seconds=cluster.timeout,
            local_device_ids=own_devices(os.environ),
        )
        jax.devices()
    _print_past_libraries()
    _at_abort(2, f"error: {LOSS}", GOES_ON)
    watcher = threading.Thread(target=_watch, args=(_client(),), daemon=True)
    watcher.start()

    def part() -> None:
        _leaving.set()
        watcher.join()

    atexit.register(part)  # runs before JAX's own function, which closes the connection under the watcher


def _watch(client: Any) -> None:
    """Ends this process when another one fails, with what that one says."""
    while not _leaving.wait(_LOOK):
        try:
            who = json.loads(client.key_value_try_get(_FAILED))
        except Exception as error:  # JAX's runtime has an error type of its own, with codes in its text
            if "NOT_FOUND" in str(error):
                continue
            return  # the coordinator is lost, so the runtime ends this process
        if not _leaving.wait(_OWN_END):
            console.say_at_once(f"error: process {who['process']} on {who['host']}: {who['line']}")
            os._exit(who["code"])


@contextmanager
def _libraries_silenced() -> Iterator[int]:
    """Sends what C++ writes nowhere; yields a descriptor of the real standard error."""
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield kept[1]
    finally:
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(nowhere)


def _print_past_libraries() -> None:
    """Leaves standard output to results: Gloo writes a line there for every group of devices that it connects."""
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", buffering=1)


_handler: Callable[..., Any] | None = None  # C has its address


def _at_abort(terminal: int, line: str, code: int) -> None:
    """What this process says last, and its exit code, where JAX's runtime aborts it because others are gone.

    The runtime calls abort() in a thread of its own, after pages of C++; Python's handlers would not run any more.
    """
    global _handler

    def end(number: int) -> None:
        if _leaving.is_set():
            os._exit(_own_code)
        os.write(terminal, f"{line}\n".encode())
        os._exit(code)

    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _handler)
