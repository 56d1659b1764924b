"""A roll call of the processes of a run, before JAX's distributed runtime starts, which aborts where one is missing."""

import contextlib
import errno
import itertools
import json
import socket
import time
from collections.abc import Callable
from typing import Any

_LONGEST = 10_000  # bytes of a message
_OFTEN = 10.0  # seconds between two reports


def roll_call(
    coordinator: str, num_processes: int, process_id: int, *, seconds: float, report: Callable[[str], Any]
) -> None:
    """Waits until all processes are there, each under an index of its own and told of the same number.

    Process 0 listens at the coordinator's port, on which JAX's service listens afterwards; the others come to it.

    Args:
      coordinator: 'host:port' of process 0.
      num_processes: number of processes.
      process_id: index of this process.
      seconds: how long to wait.
      report: is told what is waited for.

    Raises:
      RuntimeError: in every process that is there, if one is missing after that time, twice there, or told of another
        number; and for a host that can't be resolved or a port in use.
    """
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    if not 0 < int(port) < 2**16:
        raise RuntimeError(f"the coordinator's port must be from 1 to 65535, got {port}.")
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no name of a host"
        raise RuntimeError(f"the coordinator's host {host!r} can't be resolved ({reason}).") from error
    if process_id == 0 and not any(_is_here(family, address[0]) for family, _, _, _, address in addresses):
        report(f"{host} is no address of this machine, which process 0 has to be on unless it is forwarded here")
    if process_id == 0:
        _listen(coordinator, int(port), num_processes, end, seconds, report)
    else:
        _come(host.strip("[]"), int(port), {"id": process_id, "processes": num_processes}, end, seconds, report)


def _listen(coordinator: str, port: int, count: int, end: float, seconds: float, report: Callable[[str], Any]) -> None:
    there, connections = {0}, []
    problem, said = "", time.monotonic() - _OFTEN + 1
    with contextlib.ExitStack() as stack:
        with _server(port) as server:
            while not problem and len(there) < count:
                missing, now = _missing(there, count), time.monotonic()
                if now >= end:
                    problem = f"{missing} of {count} did not come to {coordinator} within {seconds:g} s."
                    break
                if now - said >= _OFTEN:
                    said = now
                    report(f"waiting for {missing} of {count} at {coordinator}, {end - now:.0f} s more")
                server.settimeout(min(1.0, end - now))
                with contextlib.suppress(TimeoutError):
                    connection = stack.enter_context(server.accept()[0])
                    message = _received(connection, 5.0)
                    number, told = message.get("id"), message.get("processes")
                    if not isinstance(number, int):
                        continue  # it is none of ours
                    connections.append(connection)
                    if told != count:
                        problem = f"process {number} was told of {told} processes, and process 0 of {count}."
                    elif number in there:
                        problem = f"two processes were started as process {number}."
                    there.add(number)
        for connection in connections:  # the port is free now
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")
    if problem:
        raise RuntimeError(problem)


def _is_here(family: int, address: Any) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind((address, 0))
    except OSError:
        return False
    return True


def _server(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        what = "is in use on this machine" if error.errno == errno.EADDRINUSE else f"can't be used ({error.strerror})"
        raise RuntimeError(f"the coordinator's port {port} {what}; choose another.") from error


def _come(
    host: str, port: int, message: dict[str, int], end: float, seconds: float, report: Callable[[str], Any]
) -> None:
    said = time.monotonic() - _OFTEN + 1
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=1.0)
            break
        except OSError as error:
            if (now := time.monotonic()) >= end:
                reason = error.strerror or error
                raise RuntimeError(f"process 0 was not at {host}:{port} within {seconds:g} s ({reason}).") from error
            if now - said >= _OFTEN:
                said = now
                report(f"waiting for process 0 at {host}:{port}, {end - now:.0f} s more")
            time.sleep(0.1)
    with connection:
        connection.sendall(json.dumps(message).encode() + b"\n")
        answer = _received(connection, max(0.0, end - time.monotonic()) + 5.0)
    if problem := answer.get("problem", f"process 0 at {host}:{port} has ended, or does not wait for this one."):
        raise RuntimeError(str(problem))


def _received(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """Returns the message of a connection; an empty one where none comes in time, or something else."""
    end, text = time.monotonic() + seconds, b""
    try:
        while not text.endswith(b"\n") and len(text) < _LONGEST and (left := end - time.monotonic()) > 0:
            connection.settimeout(left)
            if not (part := connection.recv(_LONGEST)):
                break
            text += part
        message = json.loads(text or b"{}")
    except (OSError, ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _missing(there: set[int], count: int) -> str:
    """Names the processes that are not there, the first of them."""
    first = itertools.islice((i for i in range(count) if i not in there), 9)
    shown = [str(i) for i in first]
    several = "es" * (count - len(there) > 1)
    return f"process{several} {', '.join(shown[:8])}{', …' * (len(shown) > 8)}"
