"""Writing in a process of its own, where it costs Python time: the pipeline's threads keep the interpreter for them."""

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from digit_ds.errors import UserError
from digit_ds.parallel.workers import ignore_stop_signals


class WriterProcess:
    """Calls ``write(*arguments)`` in a forked process, one call at a time, and hands its exceptions back.

    A context manager. The process ends with the caller's, even when that is killed.
    """

    def __init__(self, write: Callable[..., None]) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, self._connection, write), daemon=True)
        self._process.start()
        other_end.close()

    def __call__(self, *arguments: Any) -> None:
        """Write, and wait for it.

        Raises:
            UserError: the process was killed.
        """
        try:
            self._connection.send(arguments)
            failure = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise UserError(
                f"the process {self._process.pid} that writes blocks ended with status {self._process.exitcode} "
                "(-9: killed, perhaps by the out-of-memory killer); run the same command again to continue"
            ) from error
        if failure is not None:
            raise failure

    def __enter__(self) -> "WriterProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(BrokenPipeError):  # it was killed, which the call under way has reported
            self._connection.send(None)
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, callers_end: Connection, write: Callable[..., None]) -> None:
    """Write what arrives until the caller says None or is gone."""
    ignore_stop_signals()
    callers_end.close()
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        if arguments is None:
            return
        try:
            write(*arguments)
            connection.send(None)
        except Exception as error:
            connection.send(error)
