"""Requests to stop: one may come as several signals at once, a later one means now."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from restomod.train import signals
from restomod.train.signals import StopSignal


def test_signals_that_come_together_are_one_request(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignal() as stop:
        assert not stop.requested
        for sent in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(sent)
        assert stop.requested
    assert capfd.readouterr().err.count("stopping after this step") == 1


@pytest.fixture
def usual() -> Iterator[None]:
    """Python's own answer to Ctrl-C, which who runs the tests may have replaced."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual")
def test_a_later_signal_acts_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(signals, "ONE_REQUEST", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_request_is_taken_where_nobody_reads_the_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, text: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(signals.os, "write", broken)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
