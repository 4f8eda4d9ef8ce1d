"""One process at a time in a folder: a build of engines, a conversion of packs.

The lock is the system's, on an open file: it ends with the process that holds it, however that ends. The file stays, as
whoever waits has it open: were it removed, a third process would lock another file of the same name. Everybody may open
it, whatever the umask of who made it: else only that user could ever build in a folder that several may write.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

EVERYBODY = 0o666
POLL_SECONDS = 0.25


@contextmanager
def exclusive(
    path: Path, *, waiting: Callable[[], None], meanwhile: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the lock; the thread that holds it may take it again.

    Args:
        path: of the lock file, made if it is not there; its folder is.
        waiting: called once if somebody else holds the lock.
        meanwhile: called several times a second while waiting; what it raises ends that.

    Raises:
        OSError: the file cannot be made or opened.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415 - 30 ms that most commands need not pay

    lock = FileLock(path, mode=EVERYBODY, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        while not lock.is_locked:
            meanwhile()
            with suppress(Timeout):
                lock.acquire(timeout=POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()


class OneUser:
    """Something that one thread uses at a time, in the process that made it.

    Args:
        busy: the error for another thread that does not wait.
        in_child: the error for a process that was forked since: it has the memory, but none of the threads.
    """

    def __init__(self, busy: Callable[[], Exception], in_child: Callable[[], Exception]) -> None:
        self._busy, self._in_child = busy, in_child
        self._lock = threading.RLock()
        self._process = os.getpid()

    @property
    def in_child(self) -> bool:
        """Whether this process was forked since."""
        return os.getpid() != self._process

    @contextmanager
    def using(self) -> Iterator[None]:
        """Use it; the thread that does may do so again inside."""
        if self.in_child:
            raise self._in_child()
        if not self._lock.acquire(blocking=False):
            raise self._busy()
        try:
            yield
        finally:
            self._lock.release()
