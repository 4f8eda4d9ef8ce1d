"""Errors as problem documents (RFC 9457): the sentence of the error, and the status that it means to a client."""

import re
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from ...engines.errors import BudgetTooSmall, DeviceFailed, EnginesError, OutOfDeviceMemory
from ...lora.errors import LoraNotFinite, StrengthInvalid, WeightsMismatch
from ...machine.errors import DiskFull, I2LError, OutputUnwritable, PackageMissing
from ...runtime.pictures.errors import ImageError
from .. import errors as serve

MEDIA_TYPE = "application/problem+json"
STATUS: tuple[tuple[type[I2LError], HTTPStatus], ...] = (
    (serve.TokenWrong, HTTPStatus.UNAUTHORIZED),
    (serve.OriginForeign, HTTPStatus.FORBIDDEN),
    (serve.JobUnknown, HTTPStatus.NOT_FOUND),
    (serve.JobUnfinished, HTTPStatus.CONFLICT),
    (serve.JobLost, HTTPStatus.GONE),
    (serve.BodyTooLarge, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (serve.PicturesTooMany, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (serve.PictureTooLarge, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (serve.MediaTypeForeign, HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
    (serve.RequestInvalid, HTTPStatus.UNPROCESSABLE_ENTITY),
    (serve.BodyTooSlow, HTTPStatus.REQUEST_TIMEOUT),
    (serve.QueueFull, HTTPStatus.TOO_MANY_REQUESTS),
    (serve.ServiceStopping, HTTPStatus.SERVICE_UNAVAILABLE),
    (serve.ServiceNotReady, HTTPStatus.SERVICE_UNAVAILABLE),
    (serve.RequestTimedOut, HTTPStatus.GATEWAY_TIMEOUT),
    (ImageError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (StrengthInvalid, HTTPStatus.UNPROCESSABLE_ENTITY),
    (WeightsMismatch, HTTPStatus.UNPROCESSABLE_ENTITY),
    (LoraNotFinite, HTTPStatus.UNPROCESSABLE_ENTITY),
    (PackageMissing, HTTPStatus.NOT_IMPLEMENTED),
    (DiskFull, HTTPStatus.INSUFFICIENT_STORAGE),
    (OutputUnwritable, HTTPStatus.INSUFFICIENT_STORAGE),
    (EnginesError, HTTPStatus.SERVICE_UNAVAILABLE),
    (BudgetTooSmall, HTTPStatus.SERVICE_UNAVAILABLE),
    (DeviceFailed, HTTPStatus.SERVICE_UNAVAILABLE),
    (OutOfDeviceMemory, HTTPStatus.SERVICE_UNAVAILABLE),
)
"""The first that an error is of; what is not here is our own fault."""


def status_of(error: I2LError) -> HTTPStatus:
    """The HTTP status that an error means."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR)


def problem(error: I2LError) -> dict[str, Any]:
    """The members of a problem document. Its type is a name, as RFC 9457 allows: ``urn:i2l:problem:queue-full``."""
    words = re.findall(r"[A-Z][a-z0-9]*", type(error).__name__)
    return {
        "type": f"urn:i2l:problem:{'-'.join(words).lower()}",
        "title": " ".join(words).capitalize(),
        "status": int(status_of(error)),
        "detail": str(error),
    }


def problem_response(error: I2LError) -> JSONResponse:
    """The answer for an error, with when to try again and how to log in where that helps."""
    headers = {}
    if isinstance(error, serve.QueueFull | serve.ServiceStopping | serve.ServiceNotReady):
        headers["Retry-After"] = str(error.retry_seconds)
    if isinstance(error, serve.TokenWrong):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem(error), status_of(error), headers, MEDIA_TYPE)


def plain_problem(status: int, detail: str) -> dict[str, Any]:
    """A problem that HTTP itself explains, such as 405: its type is ``about:blank``."""
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
