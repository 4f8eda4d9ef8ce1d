"""One build at a time in an engines directory.

The lock is the system's, on an open file: it ends with the process that holds it, however that ends. The file stays, as
a build that waits has it open: were it removed, a third build would lock another file of the same name.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import format_path
from ..files import explained_os_errors

log = logging.getLogger(__name__)
LOCK = ".build.lock"


@contextmanager
def only_build(engines: Path) -> Iterator[None]:
    """Make ``engines`` and hold it; if another process builds there, say so and wait until it is done.

    Raises:
        OutputUnwritable, DiskFull: the directory cannot be made or written.
    """
    with explained_os_errors(engines):
        engines.mkdir(parents=True, exist_ok=True)
        lock = FileLock(engines / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("another build is at work in %s: waiting for it", format_path(engines))
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
