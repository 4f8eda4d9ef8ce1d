"""What a file must be: its size and its hash, which is made region by region where it is large.

A pack of gigabytes is hashed while it is written, once; at every opening a few regions of it are read and compared. So
the hash of a large file is that of its regions' hashes: one pass gives both.
"""

import hashlib
from dataclasses import dataclass

REGION_BYTES = 2 << 20
"""4,600 regions at full size, whose marks take 73 KB of the manifest."""
MARK_DIGITS = 16
"""Hexadecimal digits of a region's hash that are kept: against rot, not malice, 64 bits are plenty."""


@dataclass(frozen=True)
class FileFacts:
    """What a file must be."""

    nbytes: int
    sha256: str
    """Of its bytes; of a file of several regions, of the regions' SHA-256 one after another."""
    regions: str = ""
    """:data:`MARK_DIGITS` for each region, where there are several."""

    def region_mark(self, index: int) -> str:
        """What a region's hash begins with."""
        return self.regions[index * MARK_DIGITS : (index + 1) * MARK_DIGITS]


class Hasher:
    """Hashes a file as its bytes come."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._digests: list[bytes] = []
        self._region = hashlib.sha256()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes, in pieces of any size."""
        rest = memoryview(data)
        while rest:
            if self._nbytes and self._nbytes % REGION_BYTES == 0:
                self._digests.append(self._region.digest())
                self._region = hashlib.sha256()
            piece = rest[: REGION_BYTES - self._nbytes % REGION_BYTES]
            self._region.update(piece)
            self._nbytes += len(piece)
            rest = rest[len(piece) :]

    def facts(self) -> FileFacts:
        """Of all the bytes that came."""
        if not self._digests:
            return FileFacts(self._nbytes, self._region.hexdigest())
        digests = [*self._digests, self._region.digest()]
        marks = "".join(digest.hex()[:MARK_DIGITS] for digest in digests)
        return FileFacts(self._nbytes, hashlib.sha256(b"".join(digests)).hexdigest(), marks)


def region_mark(data: bytes) -> str:
    """What the hash of a region begins with."""
    return hashlib.sha256(data).hexdigest()[:MARK_DIGITS]
