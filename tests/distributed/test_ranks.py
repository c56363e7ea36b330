"""Ranks as threads of one process: meeting, hearing of each other's end, keeping strangers out."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from m27quant.distributed import join as joining
from m27quant.distributed.channel import MAX_MESSAGE, Channel
from m27quant.distributed.join import LOOPBACK, Meeting, call
from m27quant.distributed.ranks import ALONE, Ranks
from m27quant.errors import CalibrationError, EnvironmentFault, Interrupted, M27Error


def connected() -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection."""
    with socket.create_server((LOOPBACK, 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


def nothing() -> None:
    """Never stop."""


@pytest.fixture
def group() -> Iterator[Callable[[int], list[Ranks]]]:
    """A function that makes ranks that know each other."""
    made: list[Ranks] = []

    def make(size: int) -> list[Ranks]:
        meeting = Meeting()
        with ThreadPoolExecutor(size) as threads:
            others = [
                threads.submit(call, LOOPBACK, meeting.port, meeting.secret, rank, size)
                for rank in range(1, size)
            ]
            first = meeting.open(size, nothing)
        ranks = [first, *(other.result() for other in others)]
        made.extend(ranks)
        return ranks

    yield make
    for ranks in made:
        ranks.close()


def on_all(ranks: list[Ranks], work: Callable[[Ranks], Any]) -> list[Future[Any]]:
    """What `work` gives or raises on each."""
    with ThreadPoolExecutor(len(ranks)) as threads:
        return [threads.submit(work, r) for r in ranks]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_everybody_gets_everybodys_value_to_the_bit(size: int, group: Callable[[int], list[Ranks]]) -> None:
    ranks = [ALONE] if size == 1 else group(size)
    values = [[0.1 + r, 2.0**-149, [r], None, "x" * 100_000] for r in range(size)]

    def work(r: Ranks) -> list[Any]:
        found = [r.gather(f"step {n}", values[r.rank], nothing) for n in range(3)]
        assert r.share("word", r.rank, nothing) == 0
        return found

    assert [f.result() for f in on_all(ranks, work)] == [[values] * 3] * size


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 6, 256])
def test_all_is_dealt_out_once_and_evenly(size: int, count: int) -> None:
    ranks = [Ranks(r, size) for r in range(size)]
    parts = [list(r.part(count)) for r in ranks]
    assert sum(parts, []) == list(range(count))  # noqa: RUF017 - short
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [sum(r.owns(i) for r in ranks) for i in range(count)] == [1] * count


def test_a_fault_reaches_all_with_its_class_code_and_rank(group: Callable[[int], list[Ranks]]) -> None:
    ranks = group(4)

    def work(r: Ranks) -> None:
        try:
            if r.rank == 2:
                raise CalibrationError("too many rows", hint="look at them")
            r.gather("never", None, nothing)
        except BaseException as fault:
            r.fail(fault)
            raise

    faults = [f.exception() for f in on_all(ranks, work)]
    assert [type(f) for f in faults] == [CalibrationError] * 4
    for rank in (0, 1, 3):
        fault = faults[rank]
        assert isinstance(fault, M27Error)
        assert (fault.message, fault.hint, fault.exit_code) == (
            "rank 2 of 4: too many rows",
            "look at them",
            1,
        )
    assert [r.is_spokesman for r in ranks] == [True, False, False, False]


def test_other_ends_are_told_too(group: Callable[[int], list[Ranks]]) -> None:
    for fault, kind, code in (
        (Interrupted("stopped by SIGTERM", signum=15), Interrupted, 143),
        (ValueError("a bug\nwith lines"), M27Error, 70),
    ):
        ranks = group(2)
        ranks[1].fail(fault)
        with pytest.raises(kind, match=r"^rank 1 of 2: ") as caught:
            ranks[0].gather("never", None, nothing)
        assert caught.value.exit_code == code
        assert "lines" not in caught.value.message


@pytest.mark.parametrize("gone", [0, 2])
def test_who_hangs_up_without_a_word_is_named_at_once(gone: int, group: Callable[[int], list[Ranks]]) -> None:
    ranks = group(3)
    left = [r for r in ranks if r.rank != gone]
    threading.Timer(0.2, ranks[gone].close).start()
    started = time.monotonic()
    faults = [f.exception() for f in on_all(left, lambda r: r.gather("never", None, nothing))]
    assert time.monotonic() - started < 10
    for fault in faults:
        assert isinstance(fault, EnvironmentFault)
        assert f"rank {gone} of 3 (process " in fault.message
        assert "--resume" in str(fault.hint)
    with pytest.raises(EnvironmentFault):
        left[0].check()
    assert [r.is_spokesman for r in left] == [True, False]


@pytest.mark.parametrize("leaving", [0, 1])
def test_who_has_said_goodbye_is_not_missed(leaving: int, group: Callable[[int], list[Ranks]]) -> None:
    ranks = group(3)
    on_all(ranks, lambda r: r.gather("last", r.rank, nothing))
    ranks[leaving].say_goodbye()
    ranks[leaving].close()
    time.sleep(0.2)
    for r in ranks:
        r.check()
    with pytest.raises(M27Error, match=f"rank {leaving} is at 'goodbye'"):  # instead of waiting for ever
        ranks[0 if leaving else 1].gather("one more", None, nothing)


def test_who_waits_still_hears_a_signal(group: Callable[[int], list[Ranks]]) -> None:
    def stop() -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        group(2)[0].gather("never", None, stop)


def test_ranks_at_different_steps_are_a_bug_that_shows(group: Callable[[int], list[Ranks]]) -> None:
    ranks = group(2)
    faults = [f.exception(5) for f in on_all(ranks[:1], lambda r: None)]
    assert faults == [None]
    ranks[1]._send(ranks[1]._peers[0], {"step": "b", "value": 1})
    with pytest.raises(M27Error, match="rank 1 is at 'b', rank 0 at 'a'"):
        ranks[0].gather("a", 1, nothing)


# -- meeting ---------------------------------------------------------------------------------------


def test_strangers_are_sent_away() -> None:
    meeting = Meeting()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(meeting.open, 2, nothing)
        for hello in (
            b"GET / HTTP/1.1\r\n\r\n",
            (2**32 - 1).to_bytes(4, "big"),
            b"\x00\x00\x00\x02[]",
            b"\x00\x00\x00\x0f" + b'{"secret": "x"}',
        ):
            with socket.create_connection((LOOPBACK, meeting.port)) as stranger:
                stranger.sendall(hello)
        with pytest.raises(EnvironmentFault, match="rank 1 of 2 cannot reach rank 0"):
            call(LOOPBACK, meeting.port, "guessed", 1, 2)
        second = call(LOOPBACK, meeting.port, meeting.secret, 1, 2)
        found = on_all([first.result(), second], lambda r: r.gather("here", r.rank, nothing))
        assert [f.result() for f in found] == [[0, 1]] * 2
        first.result().close()
        second.close()


def test_ranks_that_never_come_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "JOIN_S", 0.3)
    with pytest.raises(EnvironmentFault, match=r"ranks \[1, 2\] of 3 did not come"):
        Meeting().open(3, nothing)


def test_a_message_that_claims_to_be_huge_is_refused_before_it_is_read() -> None:
    one, two = connected()
    one.sendall((MAX_MESSAGE + 1).to_bytes(4, "big"))
    with pytest.raises(ValueError, match="too long"):
        Channel(two).receive()
    one.close()
    two.close()
