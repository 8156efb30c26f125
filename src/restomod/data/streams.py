"""Streaming access to the decompressed bytes and the UTF-8 text of a file."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from restomod.utils.errors import UserError
from restomod.utils.files import require_regular

READ_BYTES = 1 << 20
BOM = codecs.BOM_UTF8.decode()  # byte-order mark, not part of the text


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # detects truncated files


Decompressor = Callable[[Path], Any]  # opens a file for reading
DECOMPRESSORS: tuple[tuple[bytes, Decompressor], ...] = (  # first bytes -> decompressor
    (b"\x1f\x8b", gzip.GzipFile),
    (b"\xfd7zXZ\0", lzma.LZMAFile),
    (b"\x5d\0\0", lzma.LZMAFile),  # the older .lzma format
    (b"BZh", bz2.BZ2File),
    (b"\x28\xb5\x2f\xfd", _zstd),
    *((bytes([byte]) + b"\x2a\x4d\x18", _zstd) for byte in range(0x50, 0x60)),  # skippable frame, written by pzstd
)
COMPRESSION_ENDINGS = (".gz", ".xz", ".zst", ".bz2", ".lzma")


def compression_of(file: Path | bytes) -> Decompressor | None:
    """Return the decompressor of a file; None if the file is not compressed.

    Args:
        file: path of the file, or its first bytes (at least 13).

    Raises:
        UserError: the file cannot be opened.
    """
    if isinstance(file, Path):
        with _opened(file) as f:
            file = f.read(13)
    sure: dict[Decompressor, bool] = {  # more bytes, because text can begin with a magic number
        gzip.GzipFile: file[2:3] == b"\x08" and file[3:4] < b"\x20",
        bz2.BZ2File: file[4:10] in (b"1AY&SY", b"\x17rE8P\x90"),  # block header, or the end of an empty file
        lzma.LZMAFile: file[:1] != b"]" or file[10:13] in (b"\xff" * 3, bytes(3)),
    }
    return next((d for magic, d in DECOMPRESSORS if file.startswith(magic) and sure.get(d, True)), None)


def _opened(path: Path) -> IO[bytes]:
    require_regular(path)
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the path of a file") from None
    except OSError as e:
        raise UserError(f"{path}: cannot read it ({e.strerror})") from None


def open_stream(path: Path) -> IO[bytes]:
    """Open a file for reading, with decompression if its first bytes are those of a compressed file.

    Raises:
        UserError: the file is not a regular file, cannot be opened, or needs pyarrow.
    """
    decompress = compression_of(path) or _opened
    try:
        file: IO[bytes] = decompress(path)
        return file
    except OSError as e:
        raise UserError(f"{path}: cannot read it ({e.strerror})") from None
    except ImportError:
        raise UserError(f"{path} is compressed with Zstandard and needs pyarrow: pip install pyarrow") from None


def chunks(path: Path) -> Generator[bytes, None, None]:
    """Yield the decompressed bytes of a file in chunks of about `READ_BYTES`.

    Raises:
        UserError: the file cannot be read or is damaged.
    """
    with open_stream(path) as f:
        yield from checked_reads(path, iter(lambda: f.read(READ_BYTES), b""))


def checked_reads(path: Path, reads: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the items of ``reads``, and convert errors of a damaged file into UserErrors.

    Raises:
        UserError: the file is truncated or damaged.
    """
    try:
        yield from reads
    except EOFError:  # gzip, xz
        raise UserError(f"{path} is truncated: its compressed data is incomplete; download it again") from None
    except (lzma.LZMAError, zlib.error, OSError) as e:  # OSError: from gzip, Zstandard or the disk
        raise UserError(f"{path} is damaged: {e}; download it again") from None


def decoded(path: Path) -> Iterator[str]:
    """Yield the text of a file in parts.

    Raises:
        UserError: the file cannot be read, is damaged, not UTF-8, or filled with NUL bytes.
    """
    with closing(chunks(path)) as reads:
        yield from decode_parts(path, reads)


def decode_parts(path: Path, parts: Iterable[bytes]) -> Iterator[str]:
    """Decode the bytes of a file in parts, without a byte-order mark at the beginning.

    Args:
        path: path of the file, for error messages.
        parts: bytes of the file in parts of any length.

    Raises:
        UserError: the bytes are not UTF-8, or more than half of them are NUL; the latter is raised at the end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = zeros = 0
    for part in itertools.chain(parts, [b""]):
        begun = len(decoder.getstate()[0])  # bytes of an incomplete character
        try:
            text = decoder.decode(part, final=not part)
        except UnicodeDecodeError as e:
            raise _not_utf8(path, e, read - begun + e.start) from None
        zeros += part.count(0)
        if read - begun <= 0 and text.startswith(BOM):
            text = text[1:]
        read += len(part)
        if text:
            yield text
    refuse_zeros(str(path), zeros, read)


def decode_line(path: Path, content: bytes, line: Callable[[], int]) -> str:
    """Decode one line of a file.

    Args:
        path: path of the file, for error messages.
        content: bytes of the line.
        line: function that returns the line number, for error messages.

    Raises:
        UserError: the line is not UTF-8, or more than half of it is NUL bytes.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise _not_utf8(path, e, e.start, f" of line {line()}") from None
    if b"\0" in content:
        refuse_zeros(f"{path}, line {line()},", content.count(0), len(content))
    return text


def refuse_zeros(where: str, zeros: int, size: int) -> None:
    """Check that at most half of the bytes of a text are NUL.

    Args:
        where: position of the text, for the error message.
        zeros: number of NUL bytes.
        size: number of bytes.

    Raises:
        UserError: more than half of the bytes are NUL.
    """
    if zeros > size // 2:
        raise UserError(
            f"{where} is filled with NUL bytes: not text, or incompletely written; download it again or exclude it"
        )


def _not_utf8(path: Path, e: UnicodeDecodeError, offset: int, where: str = "") -> UserError:
    return UserError(
        f"{path} is not UTF-8 text: byte 0x{e.object[e.start]:02x} at offset {offset}{where} ({e.reason}); "
        f"convert it, or exclude it with a glob"
    )
