"""Work that a thread does while its caller goes on."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Background(Generic[T]):
    """One call in a daemon thread: a thread that waits for a lost peer does not keep its process from ending."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        """Begin ``work()``; ``name`` is the thread's, for the stacks of a rank that hangs."""
        self._work, self._result = work, cast(T, None)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._do, name=name, daemon=True)
        self._thread.start()

    def _do(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # handed to the thread that waits
            self._error = error

    def wait(self) -> T:
        """What ``work`` returned, once it has.

        Raises:
            BaseException: what ``work`` raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result
