"""The line of text on the node that runs: what it is doing, what it made, or why it failed.

ComfyUI's bar says how far, not what; and the window of an error shows its text only behind "View details".
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from comfy_execution.utils import get_executing_context
from server import PromptServer

from comfy.model_management import InterruptProcessingException

from ..machine.errors import I2LError

Tell: TypeAlias = Callable[[str], None]
"""Shows a text on the node, in place of the one before."""


@contextmanager
def node_text() -> Iterator[Tell]:
    """Yield what shows a text on the running node, to who queued the prompt; an error of i2l is shown there, too.

    It may be called from any thread. A prompt without a browser (the API's) has nobody to see it.
    """
    context = get_executing_context()
    before = ""

    def tell(text: str) -> None:
        nonlocal before
        server = PromptServer.instance
        if context is not None and server.client_id is not None and text != before:
            before = text
            server.send_progress_text(text, context.node_id, server.client_id)

    try:
        yield tell
    except I2LError as error:
        tell(str(error))
        raise
    except InterruptProcessingException:
        tell("interrupted")
        raise
