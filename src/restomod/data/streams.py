"""The decompressed bytes and the text of a file, read as a stream; whatever is wrong with them is one line."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, cast

from restomod.errors import UserError

READ_BYTES = 1 << 20


def _gzip(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb"))


def _xz(path: Path) -> IO[bytes]:
    return lzma.open(path, "rb")


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # notices a truncated file


DECOMPRESSORS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": _gzip, ".xz": _xz, ".zst": _zstd}


def open_stream(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed as its ending says.

    Raises:
        UserError: it cannot be opened.
    """
    decompress = DECOMPRESSORS.get(path.suffix.lower())
    try:
        return decompress(path) if decompress else path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    except OSError as e:
        raise UserError(f"{path}: cannot read it ({e.strerror})") from None
    except ImportError:
        raise UserError(f"{path} is compressed with Zstandard: pip install pyarrow") from None


def chunks(path: Path) -> Generator[bytes, None, None]:
    """The decompressed bytes of a file, in order.

    Raises:
        UserError: the file cannot be read or is damaged.
    """
    with open_stream(path) as f:
        yield from guarded(path, iter(lambda: f.read(READ_BYTES), b""))


def guarded(path: Path, reads: Iterable[bytes]) -> Iterator[bytes]:
    """Pass ``reads`` on, and turn what a damaged file raises into a UserError."""
    try:
        yield from reads
    except EOFError:  # gzip, xz
        raise UserError(f"{path} is truncated: its compressed data ends too soon; get it again") from None
    except (lzma.LZMAError, zlib.error, OSError) as e:  # OSError: gzip's and Zstandard's, and the disk's
        raise UserError(f"{path} is damaged: {e}; get it again") from None


def decoded(path: Path) -> Iterator[str]:
    """The text of a file, in parts; raises as `chunks` and `decode_parts`."""
    with closing(chunks(path)) as reads:
        yield from decode_parts(path, reads)


def decode_parts(path: Path, parts: Iterable[bytes]) -> Iterator[str]:
    """The text of a file's bytes, part by part.

    Raises:
        UserError: they are not UTF-8, or more than half of them are NUL, which is known at the end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = zeros = 0
    for part in itertools.chain(parts, [b""]):
        begun = len(decoder.getstate()[0])  # bytes of a character whose end was still to come
        try:
            text = decoder.decode(part, final=not part)
        except UnicodeDecodeError as e:
            raise _not_utf8(path, e, read - begun + e.start) from None
        read += len(part)
        zeros += part.count(0)
        if text:
            yield text
    refuse_zeros(str(path), zeros, read)


def decode_line(path: Path, content: bytes, line: Callable[[], int]) -> str:
    """The text of one line.

    Args:
        path: of its file, for messages.
        content: its bytes.
        line: tells its number.

    Raises:
        UserError: it is not UTF-8, or filled with NUL bytes.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise _not_utf8(path, e, e.start, f" of line {line()}") from None
    if b"\0" in content:
        refuse_zeros(f"{path}, line {line()},", content.count(0), len(content))
    return text


def refuse_zeros(where: str, zeros: int, size: int) -> None:
    """Refuse text of ``size`` bytes if more than half of them are NUL."""
    if zeros > size // 2:
        raise UserError(
            f"{where} is filled with NUL bytes: it is not text, or was not wholly written; get it again or leave it out"
        )


def _not_utf8(path: Path, e: UnicodeDecodeError, offset: int, where: str = "") -> UserError:
    return UserError(
        f"{path} is not UTF-8 text: byte 0x{e.object[e.start]:02x} at offset {offset}{where} ({e.reason}); "
        f"convert it, or leave it out with a glob"
    )
