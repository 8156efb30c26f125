"""Settings under which any text is a long one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from restomod.data import documents, readers, streams
from restomod.data.prepare import worker


@contextlib.contextmanager
def tiny_pieces(read_bytes: int = 11, piece: int = 30) -> Iterator[None]:
    """Every plain file is read in parts of a few bytes and encoded in pieces of a few words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "READ_BYTES", read_bytes)
        patch.setattr(readers, "READ_BYTES", read_bytes)
        patch.setattr(readers, "LONG_TEXT", 0)
        patch.setattr(documents, "PIECE_CHARACTERS", piece)
        patch.setattr(worker, "PIECE_CHARACTERS", piece)
        patch.setattr(worker, "COPY_TOKENS", 70)
        yield
