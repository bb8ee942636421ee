"""Signals that ask a training to leave."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import psutil
import pytest

from masksam_nnunet import stop_signals
from masksam_nnunet.stop_signals import SIGNALS, handling, leave_at_once, pass_on


def test_handlers_come_back_and_ignored_signals_stay_so() -> None:
    outer: list[int] = []
    inner: list[int] = []
    with handling(outer.append):
        with handling(inner.append):
            for number in SIGNALS:
                signal.raise_signal(number)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        with handling(inner.append):
            signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGUSR1)
    assert inner == list(SIGNALS) and outer == [signal.SIGUSR1]


def test_a_forked_worker_does_not_react() -> None:
    with handling(lambda _: os._exit(1)):
        pid = os.fork()
        if pid == 0:
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
                signal.raise_signal(number)
            left = signal.alarm(0)  # that SIGTERM has set
            os._exit(0 if 0 < left <= stop_signals.WORKER_SECONDS else 2)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def _wait_for_usr1() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(33))
    time.sleep(60)


def test_ranks_get_what_their_parent_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = multiprocessing.get_context("fork").Process(target=_wait_for_usr1)
    with handling(lambda _: None):  # not yet deadly, when it comes before the rank is ready
        rank.start()
        with handling(pass_on):
            while rank.is_alive():
                signal.raise_signal(signal.SIGUSR1)
                rank.join(0.1)
    assert rank.exitcode == 33
    monkeypatch.setattr(stop_signals, "leave_at_once", lambda: pytest.fail("left"))
    with handling(pass_on), pytest.raises(pytest.fail.Exception, match="left"):  # no ranks
        signal.raise_signal(signal.SIGUSR1)


def test_leaving_is_with_75_and_takes_the_workers_along() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        os.write(writing, f"{child.pid}\n".encode())
        leave_at_once()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    grandchild = int(os.read(reading, 20))
    end = time.monotonic() + 10
    while psutil.pid_exists(grandchild) and psutil.Process(grandchild).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)
