"""Settings that treat every text as a long text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from restomod.data import documents, readers, streams
from restomod.data.prepare import worker


@contextlib.contextmanager
def tiny_pieces(read_bytes: int = 11, piece: int = 30) -> Iterator[None]:
    """Read plain files in parts of a few bytes and encode them in pieces of a few words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "READ_BYTES", read_bytes)
        patch.setattr(readers, "READ_BYTES", read_bytes)
        patch.setattr(readers, "LONG_TEXT", 0)
        patch.setattr(documents, "PIECE_CHARACTERS", piece)
        patch.setattr(worker, "PIECE_CHARACTERS", piece)
        patch.setattr(worker, "COPY_TOKENS", 70)
        yield
