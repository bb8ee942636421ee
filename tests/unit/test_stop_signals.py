"""Signals that ask a training to leave."""

from __future__ import annotations

import os
import signal
import time

import pytest

from masksam_nnunet import stop_signals
from masksam_nnunet.stop_signals import SIGNALS, StopSignals, handling, leave_at_once, passed_on


class Left(BaseException):
    """In place of the end of the process."""


@pytest.fixture(autouse=True)
def _stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> None:
        raise Left

    monkeypatch.setattr(stop_signals, "leave_at_once", leave)


def test_the_first_signal_waits_to_be_looked_for_and_the_next_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signals, "REPEAT_SECONDS", 0.2)
    stop = StopSignals()
    with stop.handled(), stop.gentle():
        signal.raise_signal(signal.SIGUSR1)
        assert stop.asked is signal.SIGUSR1
        signal.raise_signal(signal.SIGTERM)  # the same word, passed on
        assert stop.asked is signal.SIGUSR1
        time.sleep(0.25)
        with pytest.raises(Left):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_where_there_is_nothing_to_save_the_first_one_ends_it(number: signal.Signals) -> None:
    stop = StopSignals()
    with stop.handled():
        with pytest.raises(Left):
            signal.raise_signal(number)
        with stop.gentle():
            pass
        with pytest.raises(Left):
            signal.raise_signal(number)


def test_handlers_come_back_and_ignored_or_blocked_signals_stay_so() -> None:
    seen: list[int] = []
    with handling(lambda number, _: seen.append(number)):
        before = signal.getsignal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            stop = StopSignals()
            with stop.handled():
                for number in (signal.SIGUSR2, signal.SIGTERM):
                    signal.raise_signal(number)
            assert stop.asked is None and signal.sigpending() == {signal.SIGTERM}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        assert seen == [signal.SIGTERM], "delivered to who has it now"
        assert signal.getsignal(signal.SIGUSR1) is before


def test_a_forked_worker_neither_notes_nor_saves() -> None:
    stop = StopSignals()
    with stop.handled(), stop.gentle():
        pid = os.fork()
        if pid == 0:
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
                signal.raise_signal(number)
            left = signal.alarm(0)  # that SIGTERM has set
            os._exit(0 if stop.asked is None and 0 < left <= stop_signals.WORKER_SECONDS else 1)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_ranks_get_what_their_parent_gets() -> None:
    import multiprocessing

    rank = multiprocessing.get_context("fork").Process(target=_wait_for_usr1)
    with handling(lambda *_: None):  # not yet deadly, when it comes before the rank is ready
        rank.start()
        with passed_on():
            while rank.is_alive():
                signal.raise_signal(signal.SIGUSR1)
                rank.join(0.1)
    assert rank.exitcode == 33
    with passed_on(), pytest.raises(Left):
        signal.raise_signal(signal.SIGUSR1)


def _wait_for_usr1() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(33))
    time.sleep(60)


def test_leaving_is_with_75_and_takes_the_workers_along() -> None:
    pid = os.fork()
    if pid == 0:
        import multiprocessing

        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        assert child.pid is not None
        os.write(_WRITE, f"{child.pid}\n".encode())
        leave_at_once()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    grandchild = int(os.read(_READ, 20))
    end = time.monotonic() + 10
    while _runs(grandchild) and time.monotonic() < end:
        time.sleep(0.02)
    assert not _runs(grandchild)


_READ, _WRITE = os.pipe()


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
