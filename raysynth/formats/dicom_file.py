"""One DICOM file, parsed within bounds.

pydicom trusts what it reads: a few bytes can make it read the same megabytes a thousand times. And
it warns of what it finds odd, in words that quote the value and the name of the file.
"""

from __future__ import annotations

import logging
import os
import stat
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pydicom
from pydicom.config import disable_value_validation
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag

from raysynth.errors import UnreadableCase

MAX_FILE_BYTES = 128 << 20
MAX_HEADER_BYTES = 4 << 20
"""Read of one file besides its pixels. What is skipped does not count; scanners' own notes do, if
they are sequences without a length."""

MAX_VALUE_BYTES = 1 << 16
"""Of a tag that is used: an explicit VR could not say more of most of them."""

_CHARACTER_SET, _PIXEL_DATA = 0x00080005, 0x7FE00010

_PIXEL_KINDS = ("OW", "OB", "UN", None)
"""Value representations of PixelData; None: the file does not tell any."""

_READ_BYTES = 64
"""What a read counts for at least: a header has room for some 30,000 elements."""

_UNDEFINED = 0xFFFFFFFF
"""Length of an element that ends where its delimiter stands."""


def require(holds: bool, rule: str, reason: str) -> None:
    """Raises UnreadableCase(rule, reason) unless the rule holds."""
    if not holds:
        raise UnreadableCase(rule, reason)


def open_regular(path: Path, max_bytes: int, flags: int = 0) -> BinaryIO:
    """Opens a regular file of at most so many bytes to read; `flags` are more of `os.open`'s.

    Raises:
        OSError: it cannot be opened.
        UnreadableCase: it is a pipe, a device or a folder, or too large.
    """
    # Without O_NONBLOCK, opening a pipe would wait for its writer, maybe for ever.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    status = os.fstat(handle)
    try:
        require(stat.S_ISREG(status.st_mode), "unreadable", "not a regular file")
        require(
            status.st_size <= max_bytes,
            "size",
            f"a file of {status.st_size} bytes; {max_bytes} at most can be read",
        )
    except UnreadableCase:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


@contextmanager
def hushed() -> Iterator[None]:
    """Keeps pydicom from judging values, and from telling what they are, for the whole process."""
    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with disable_value_validation(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


class Place(NamedTuple):
    """Where a value begins in its file, and its bytes; None: it comes in pieces, up to a mark."""

    start: int
    length: int | None


class Parsed(NamedTuple):
    """The wanted tags, not converted yet; the transfer syntax; where the pixels are, if met."""

    tags: pydicom.Dataset
    transfer_syntax: str
    pixels: Place | None


def parse_file(path: Path, names: Collection[str], pixel_bytes: int | None = None) -> Parsed:
    """Some tags of a file.

    Args:
        path: the file.
        names: keywords of the tags that are wanted. Reading ends with the last of them.
        pixel_bytes: that PixelData may have at most, if it is among them; None: only its place is
            looked for.

    Raises:
        UnreadableCase: the file cannot be opened, is no DICOM, damaged, deflated or out of bounds.
    """
    wanted = {tag_for_keyword(name) or 0 for name in names}
    last = max(wanted)
    read = sorted(wanted - {_PIXEL_DATA} if pixel_bytes is None else wanted)
    pixels: Place | None = None

    def is_past(told: BaseTag, kind: str | None, length: int) -> bool:
        nonlocal pixels
        tag = int(told)  # whose comparisons are fast
        if tag > last:
            return True
        if tag == _PIXEL_DATA and pixel_bytes is None:
            once = pixels is None and kind in _PIXEL_KINDS
            require(once, "pixel-data", "pixels stand there twice, or as something else")
            pixels = Place(file.tell(), None if length == _UNDEFINED else length)
            return pixels.length is None
        if pixels is not None:  # behind them nothing counts
            return True
        if tag == _PIXEL_DATA and pixel_bytes is not None:
            require(
                length in (_UNDEFINED, min(length, pixel_bytes)),
                "pixel-data",
                f"{length} bytes of pixels; {pixel_bytes} at most are needed: is it another image?",
            )
        elif tag in wanted or tag == _CHARACTER_SET:
            require(
                length <= MAX_VALUE_BYTES,
                "bad-tag",
                f"{keyword_for_tag(tag)} is longer than {MAX_VALUE_BYTES} bytes",
            )
        return False

    try:
        file = open_regular(path, MAX_FILE_BYTES)
    except OSError as error:
        raise UnreadableCase("unreadable", f"a file cannot be read: {error.strerror}") from None
    # Pixels in pieces may be read twice: measured, then taken.
    bounded = _Bounded(file, MAX_HEADER_BYTES + 2 * (pixel_bytes or 0))
    with file:
        try:
            tags = read_partial(bounded, is_past, specific_tags=read)  # type: ignore[arg-type]
            syntax, failure = str(tags.file_meta.TransferSyntaxUID), ""
        except UnreadableCase:
            raise
        except Exception as error:  # pydicom may raise anything; its text could quote the file
            failure = type(error).__name__
    if bounded.is_spent and pixel_bytes:
        raise UnreadableCase("pixel-data", f"pixels of over {pixel_bytes} bytes, or without an end")
    require(
        not bounded.is_spent,
        "header-size",
        f"a header of over {MAX_HEADER_BYTES} bytes, or one that leads back and forth",
    )
    require(not failure, "not-dicom", f"a file is damaged or no DICOM ({failure})")
    return Parsed(tags, syntax, pixels)


class _Bounded:
    """An open file that ends once so many bytes were read of it, wherever they lie."""

    def __init__(self, file: BinaryIO, most_bytes: int) -> None:
        self._file, self._left = file, most_bytes
        self.seek, self.tell = file.seek, file.tell

    @property
    def is_spent(self) -> bool:
        return self._left < 0

    def read(self, size: int = -1) -> bytes:
        # Everything at once is what pydicom takes of a deflated file, to inflate it, however large.
        require(
            size >= 0,
            "transfer-syntax",
            "a deflated file: convert it to Explicit VR Little Endian",
        )
        data = b"" if self.is_spent else self._file.read(min(size, self._left + 1))
        # A read of little or nothing has its price too, so that nobody goes on for ever.
        self._left -= max(len(data), _READ_BYTES)
        return b"" if self.is_spent else data
