"""Standard output that fails no run, whatever is behind it."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Output:
    """Standard output that no terminal's encoding, closed pipe or full disk behind it can turn into a failure."""

    def __init__(self, stream: Any):
        self._stream, self.error = stream, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes, or drops the text."""
        with self._failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, or drops what is left."""
        with self._failing():
            self._stream.flush()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self.error = self.error or error
            with contextlib.suppress(OSError, ValueError):  # else Python would fail on what is left, at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def safe_output() -> Iterator[Output]:
    """Makes standard output and standard error safe, and shows what their encoding lacks as question marks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    output = Output(sys.stdout)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(Output(sys.stderr)):
        yield output
        output.flush()
