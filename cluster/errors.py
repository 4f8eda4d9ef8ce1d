"""What is wrong with a cluster."""

from collections.abc import Sequence

from ..machine.errors import I2LError
from ..machine.wording import some


class ClusterError(I2LError, RuntimeError):
    """A batch cannot go on, or begin, on these machines."""


class RayUnreachable(ClusterError, ConnectionError):
    """There is no Ray at the address, or it does not start here."""

    def __init__(self, address: str | None, reason: str) -> None:
        remedy = "start one there with: ray start --head" if address else "leave --ray out to use this process alone"
        super().__init__(
            f"Ray {f'at {address} cannot be reached' if address else 'does not start'} ({reason}): {remedy}"
        )


class MachinesTooSmall(ClusterError):
    """No machine has what one worker takes."""

    def __init__(self, needed: str, found: Sequence[str]) -> None:
        super().__init__(
            f"a worker takes {needed}, and no machine of the cluster has that ({some(list(found)) or 'it has none'}): "
            "give fewer --threads or another --backend, or add machines with: ray start --address=ADDRESS"
        )


class WorkersLost(ClusterError):
    """Nobody is left to do what remains."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__(
            f"no worker is left ({some(list(dict.fromkeys(reasons)))}): mend that and start the batch again, which "
            "skips what is finished"
        )


class PictureFatal(ClusterError):
    """Workers died whenever they were given one job alone."""

    def __init__(self, pictures: Sequence[str], deaths: int) -> None:
        super().__init__(
            f"{deaths} workers died while they were at {some(list(pictures))} alone: try it by itself with: "
            "i2l run, and look at the machines' memory"
        )
