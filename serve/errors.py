"""What is wrong with a request, or with a service. Each becomes a problem document (:mod:`.http.problems`)."""

from pathlib import Path

from ..machine.errors import I2LError
from ..machine.wording import format_bytes, format_path, printable


class ServeError(I2LError):
    """A request that cannot be answered with a LoRA."""


class AddressOpen(ServeError, ValueError):
    """Other machines would reach the service, and it asks for no token."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"{host} can be reached from other machines: give --token-file FILE, or --insecure if everybody there may "
            "use it"
        )


class AddressTaken(ServeError, OSError):
    """The service cannot listen there."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(f"cannot listen on {host} port {port} ({reason}): choose another --port or --host")


class JobsFolderTaken(ServeError, RuntimeError):
    """Another service keeps its jobs there."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{format_path(folder)} belongs to another service that runs: stop it, or give another --jobs-dir"
        )


class JobsFolderForeign(ServeError, FileExistsError):
    """Something else lies there, and what is old in a jobs' folder is removed."""

    def __init__(self, folder: Path, found: Path) -> None:
        super().__init__(
            f"{format_path(folder)} holds {printable(found.name)}, which is no job: give a folder of its own to "
            "--jobs-dir"
        )


class TokenUnusable(ServeError, ValueError):
    """The token's file holds no token."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{format_path(path)} cannot be used as a token ({reason}): make one with: "
            f"head -c 32 /dev/urandom | base64 > {format_path(path)}"
        )


class TokenWrong(ServeError, PermissionError):
    """The request has no token, or another one."""

    def __init__(self) -> None:
        super().__init__("this service wants a token: send the header Authorization: Bearer TOKEN")


class OriginForeign(ServeError, PermissionError):
    """A page of another site, or a name that is not this service's."""

    def __init__(self, header: str, value: str) -> None:
        super().__init__(
            f"the header {header} is {value[:80]!r}, which is not this service: use its own page and address"
        )


class RequestInvalid(ServeError, ValueError):
    """A field, a header or the body's form is wrong."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}: {remedy}")


class MediaTypeForeign(ServeError, ValueError):
    """The body is of a type that is not read."""

    def __init__(self, found: str) -> None:
        super().__init__(f"the body is {found[:80]!r}: send multipart/form-data with one or more parts called pictures")


class BodyTooLarge(ServeError, ValueError):
    """More bytes than a request may have."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the request is larger than {format_bytes(limit_bytes)}: send fewer or smaller pictures")


class BodyTooSlow(ServeError, TimeoutError):
    """The body comes so slowly that its place in the queue is better given to another."""

    def __init__(self) -> None:
        super().__init__("the request came too slowly: send it again over a better connection")


class PicturesTooMany(ServeError, ValueError):
    """More pictures than a request may have."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request has more than {limit} pictures: send fewer, or join LoRAs with: i2l merge")


class PictureTooLarge(ServeError, ValueError):
    """More pixels than a picture may have."""

    def __init__(self, name: str, width: int, height: int, limit: int) -> None:
        super().__init__(
            f"{name} is {width} x {height} pixels, and this service takes at most {limit:,} in a picture: resize it"
        )


class QueueFull(ServeError, RuntimeError):
    """As many requests wait as may."""

    def __init__(self, waiting: int, retry_seconds: int) -> None:
        self.retry_seconds = retry_seconds
        super().__init__(f"{waiting} requests are here already: try again in {retry_seconds} s")


class ServiceStopping(ServeError, RuntimeError):
    """The service takes no more work, or stopped before it came to this."""

    def __init__(self) -> None:
        self.retry_seconds = 30
        super().__init__("the service is stopping: send the request again once it is back")


class ServiceNotReady(ServeError, RuntimeError):
    """The engines are not open yet, or no longer."""

    def __init__(self, reason: str) -> None:
        self.retry_seconds = 5
        super().__init__(f"the engines are not ready ({reason}): ask /readyz until they are")


class RequestTimedOut(ServeError, TimeoutError):
    """The LoRA was not there in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request took longer than {seconds:g} s: send fewer pictures, or raise --time-limit")


class JobUnknown(ServeError, LookupError):
    """No such job, or it is no longer kept."""

    def __init__(self) -> None:
        super().__init__("there is no such job, or it is kept no longer: send the pictures again")


class JobUnfinished(ServeError, RuntimeError):
    """The LoRA of a job that is not done is asked for."""

    def __init__(self, state: str) -> None:
        super().__init__(f"the job is {state}: its LoRA can be had once it is done")


class JobLost(ServeError, RuntimeError):
    """The service ended before the job did."""

    def __init__(self) -> None:
        super().__init__("the service ended before this job was done: send the pictures again")


class InternalFailure(ServeError, RuntimeError):
    """Something that i2l cannot explain went wrong; the service's log has it."""

    def __init__(self, reference: str) -> None:
        super().__init__(f"something went wrong that should not: report it with the log's lines about {reference}")
