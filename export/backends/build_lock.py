"""One build at a time in an engines directory."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...engines.directory.ownership import LOCK, require_own
from ...machine.files import explained_os_errors
from ...machine.locks import exclusive
from ...machine.wording import format_path

log = logging.getLogger(__name__)


@contextmanager
def only_build(engines: Path) -> Iterator[None]:
    """Make ``engines`` and hold it; if another process builds there, say so and wait until it is done.

    Whoever holds it may take it again, so what consists of several builds holds it around them all.

    Raises:
        FolderNotEngines: something else lies there.
        OutputUnwritable, DiskFull: the directory cannot be made or written.
    """
    require_own(engines)

    def waiting() -> None:
        log.warning("another build is at work in %s: waiting for it", format_path(engines))

    with ExitStack() as stack:
        with explained_os_errors(engines):
            engines.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(engines / LOCK, waiting=waiting))
        yield
