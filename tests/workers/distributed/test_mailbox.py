"""The mailbox of a rank: what others tell it, in any order, and how waiting for them ends."""

import threading

import pytest

from workers.distributed.mailbox import Mailbox


def test_what_comes_before_a_rank_joins_is_there_and_what_is_of_a_past_epoch_is_not() -> None:
    mailbox = Mailbox()
    mailbox.open(3)
    mailbox.put(4, "a", b"early")
    mailbox.put(3, "a", b"now")
    assert mailbox.wait(3, ["a"], 0) == [b"now"]
    mailbox.open(4)
    mailbox.put(3, "b", b"late")
    assert mailbox.wait(4, ["a"], 0) == [b"early"]
    assert not mailbox.has(3, ["a"])
    assert not mailbox.has(3, ["b"])


def test_who_waits_goes_on_when_the_last_value_comes_and_fails_when_the_epoch_is_closed() -> None:
    mailbox = Mailbox()
    threading.Timer(0.05, mailbox.put, (0, "b", b"2")).start()
    mailbox.put(0, "a", b"1")
    assert mailbox.wait(0, ["a", "b"], 60) == [b"1", b"2"]
    threading.Timer(0.05, mailbox.close, (0,)).start()
    with pytest.raises(TimeoutError, match="Timed out waiting for c of another rank: the gang has failed"):
        mailbox.wait(0, ["a", "c"], 60)
    mailbox.open(1)
    mailbox.close(0)  # late: it does not end the epoch that has begun since
    mailbox.put(1, "a", b"1")
    assert mailbox.wait(1, ["a"], 0) == [b"1"]
    with pytest.raises(TimeoutError, match=r"0\.01 s have passed"):
        mailbox.wait(1, ["c"], 0.01)


def test_numbers_of_several_threads_add_up() -> None:
    mailbox = Mailbox()
    threads = [threading.Thread(target=lambda: [mailbox.add(0, "n", 2) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mailbox.add(0, "n", 0) == 800
