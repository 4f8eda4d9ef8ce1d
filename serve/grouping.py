"""Which waiting requests share the next pass over the weights. Pure: it is told sizes and times."""

from collections.abc import Sequence

from .settings import Sharing


def leading(pictures: Sequence[int], limit: int) -> int:
    """How many of the requests at the head of the queue go together.

    Args:
        pictures: of each waiting request, the oldest first.
        limit: pictures in a pass. The first goes whatever it has; none is overtaken, so none starves.
    """
    total, count = 0, 0
    for size in pictures:
        if count and total + size > limit:
            break
        total += size
        count += 1
    return count


def seconds_to_wait(pictures: Sequence[int], waited_seconds: float, sharing: Sharing) -> float:
    """How long the head of the queue should still wait for company; 0: go now.

    It goes when the pass is full, when somebody behind it no longer fits, or when its window is over.
    """
    if not pictures or leading(pictures, sharing.pictures) < len(pictures) or sum(pictures) >= sharing.pictures:
        return 0.0
    return max(0.0, sharing.window_seconds - waited_seconds)


def retry_seconds(pictures_before: int, seconds_per_picture: float) -> int:
    """When to try again: once about half of what is here is done; 1 to 600 s."""
    return max(1, min(600, round(pictures_before * seconds_per_picture / 2)))
