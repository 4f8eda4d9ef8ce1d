"""Multipart bodies, read piece by piece: pictures go to files as they come, so a body is never in memory.

The parser is python-multipart's. What it is not asked to do is choose file names, keep whole fields or wait: the
bounds are here.
"""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import anyio
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ...machine.files import explained_os_errors
from ..errors import BodyTooLarge, BodyTooSlow, MediaTypeForeign, PicturesTooMany, RequestInvalid
from ..settings import ServeLimits
from ..uploads import Upload, upload

FIELD_BYTES = 400
"""Of a field that is no picture."""
MORE_PARTS = 16
"""Fields beside weights, each of which may have one for a picture."""
BYTES_PER_SECOND = 16 << 10
"""A body that comes more slowly, after the first seconds, is given up."""


@dataclass
class Form:
    """What a body held."""

    uploads: list[Upload] = field(default_factory=list)
    fields: dict[str, list[str]] = field(default_factory=dict)


class FormReader:
    """Callbacks for the parser: every part becomes a file in ``folder`` or a short text."""

    def __init__(self, boundary: bytes, folder: Path, max_pictures: int) -> None:
        self.form = Form()
        self._folder = folder
        self._max_pictures = max_pictures
        self._parts = 0
        self._header: tuple[bytes, bytes] = (b"", b"")
        self._disposition = b""
        self._field = ""
        self._text = b""
        self._file: IO[bytes] | None = None
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, a, b: self._head(data[a:b], b""),
                "on_header_value": lambda data, a, b: self._head(b"", data[a:b]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._named,
                "on_part_data": lambda data, a, b: self._data(data[a:b]),
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    def write(self, data: bytes) -> None:
        """The next piece of the body.

        Raises:
            RequestInvalid, PicturesTooMany: its form is wrong. DiskFull: there is no room for a picture.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise RequestInvalid(f"the body is no multipart form ({error})", "send it with an HTTP library") from error

    def finish(self) -> Form:
        """The whole form; raises :class:`RequestInvalid` if the body ended early."""
        if not self._ended:
            raise RequestInvalid("the body ends before its last boundary", "send all of it")
        return self.form

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > 2 * self._max_pictures + MORE_PARTS:
            raise RequestInvalid(f"the form has more than {self._parts - 1} parts", "send fewer")
        self._disposition, self._text = b"", b""

    def _head(self, name: bytes, value: bytes) -> None:
        self._header = (self._header[0] + name, self._header[1] + value)

    def _end_header(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = (b"", b"")

    def _named(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or not options.get(b"name"):
            raise RequestInvalid("a part has no name", "send each with Content-Disposition: form-data; name=...")
        self._field = options[b"name"].decode("utf-8", "replace")
        filename = options.get(b"filename")
        if self._field == "pictures" and filename is not None:
            if len(self.form.uploads) == self._max_pictures:
                raise PicturesTooMany(self._max_pictures)
            each = upload(self._folder, len(self.form.uploads) + 1, filename.decode("utf-8", "replace"))
            with explained_os_errors(each.path):
                self._file = each.path.open("xb")
            self.form.uploads.append(each)
        elif self._field == "pictures" or filename is not None:
            what = f"the field {self._field[:40]!r} is {'no file' if filename is None else 'a file'}"
            raise RequestInvalid(what, "send pictures as files with a name, and all else as text")

    def _data(self, data: bytes) -> None:
        if self._file:
            with explained_os_errors(self._folder):
                self._file.write(data)
        elif len(self._text) + len(data) > FIELD_BYTES:
            raise RequestInvalid(f"the field {self._field[:40]!r} is longer than {FIELD_BYTES} bytes", "send less")
        else:
            self._text += data

    def _end(self) -> None:
        if self._file:
            file, self._file = self._file, None
            with explained_os_errors(self._folder):
                file.close()
            return
        try:
            text = self._text.decode()
        except UnicodeDecodeError as error:
            raise RequestInvalid(f"the field {self._field[:40]!r} is not UTF-8", "send text") from error
        self.form.fields.setdefault(self._field, []).append(text)

    def _finish(self) -> None:
        self._ended = True


def boundary_of(content_type: str) -> bytes:
    """The boundary in a Content-Type header.

    Raises:
        MediaTypeForeign: it is no multipart form. RequestInvalid: it has no boundary that can be used.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise MediaTypeForeign(content_type)
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 70:
        raise RequestInvalid("the header Content-Type has no boundary of 1 to 70 bytes", "send it with an HTTP library")
    return boundary


async def receive_form(
    content_type: str, length: str | None, chunks: AsyncIterator[bytes], folder: Path, limits: ServeLimits
) -> Form:
    """The form in a request's body.

    Args:
        content_type: the header.
        length: the header Content-Length, if there is one.
        chunks: the body.
        folder: where its pictures go.
        limits: of bytes, pictures and time.

    Raises:
        BodyTooLarge, BodyTooSlow, PicturesTooMany, MediaTypeForeign, RequestInvalid, DiskFull: as they say.
    """
    boundary = boundary_of(content_type)
    if length is not None and length.isdigit() and int(length) > limits.body_bytes:
        raise BodyTooLarge(limits.body_bytes)
    began, received = time.monotonic(), 0
    with FormReader(boundary, folder, limits.pictures) as reader:
        while True:
            left = began + limits.header_seconds + received / BYTES_PER_SECOND - time.monotonic()
            try:
                with anyio.fail_after(left):
                    data = await anext(chunks, None)
            except TimeoutError as error:
                raise BodyTooSlow from error
            if data is None:
                return reader.finish()
            received += len(data)
            if received > limits.body_bytes:
                raise BodyTooLarge(limits.body_bytes)
            reader.write(data)
