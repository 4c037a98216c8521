"""Which signals ask a run to stop, and which end it at once."""

import os
import signal

import pytest

from mask_rcnn_plus.engine import stops


def send(*numbers: int) -> int:
    """Sends signals to this process. Returns the exit code that they request."""
    signals = stops.StopSignals()
    with signals.recorded():
        for number in numbers:
            os.kill(os.getpid(), number)
    return signals.exit_code


def test_a_closing_terminal_and_a_logout_leave_time_to_save() -> None:
    hangup, terminate = signal.SIGHUP, signal.SIGTERM
    assert send(hangup) == 129
    assert send(hangup, hangup, terminate, hangup) == 129
    assert send(terminate, hangup, hangup) == 143


@pytest.mark.parametrize("first", [(), (signal.SIGHUP,)])
def test_a_second_request_ends_the_run_at_once(
    monkeypatch: pytest.MonkeyPatch, first: tuple[int, ...]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(stops.os, "_exit", codes.append)
    send(*first, signal.SIGTERM, signal.SIGINT)
    assert codes == [130]


def test_nohup_stays_in_effect() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert send(signal.SIGHUP) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_recorded_when_standard_error_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(stops.os, "write", gone)
    assert send(signal.SIGHUP) == 129
