"""The peers that a device calls, learned and kept as hashes."""

import pytest
from stonechat.errors import CollectorError
from stonechat.linux import (
    known_peers,
)
from stonechat.linux.connections import packed_address


def address(i: int) -> bytes:
    return packed_address(f"10.{i >> 16 & 255}.{i >> 8 & 255}.{i & 255}")


def test_a_peer_is_known_after_so_many_windows():
    learned = known_peers.LearnedPeers(b"secret")
    for _ in range(known_peers.KNOWN_AFTER):
        assert learned.is_new(address(1))
    assert not learned.is_new(address(1))
    assert learned.is_new(address(2))


def test_nothing_is_learned_under_suspicion():
    learned = known_peers.LearnedPeers(b"secret")
    learned.hold = True
    for _ in range(3 * known_peers.KNOWN_AFTER):
        assert learned.is_new(address(1))


def test_a_spray_forgets_no_known_peer_and_stays_bounded():
    learned = known_peers.LearnedPeers(b"secret")
    for _ in range(known_peers.KNOWN_AFTER):
        learned.is_new(address(1))
    for i in range(10_000):
        learned.is_new(address(1000 + i))
    assert not learned.is_new(address(1))
    assert len(learned) == 1
    assert len(learned._candidates) <= known_peers.MAX_CANDIDATES


def seen_often(learned: known_peers.LearnedPeers, peer: bytes, opened: bool = True) -> None:
    for _ in range(known_peers.KNOWN_AFTER):
        learned.is_new(peer, opened)


def test_the_longest_unseen_makes_place_once_it_has_not_been_seen_for_long():
    learned = known_peers.LearnedPeers(b"secret")
    for i in range(known_peers.MAX_KNOWN + 1):
        seen_often(learned, address(i))
    assert len(learned) == known_peers.MAX_KNOWN
    assert learned.forgotten == 0
    assert learned.is_new(address(known_peers.MAX_KNOWN)), "peers in use are kept, and the newcomer is new"
    for _ in range(known_peers.FORGET_AFTER):
        learned.next_window()
    assert not learned.is_new(address(0))  # seen again
    seen_often(learned, address(1000))
    assert learned.forgotten == 1
    assert not learned.is_new(address(0)) and not learned.is_new(address(1000))
    assert learned.is_new(address(1))


def test_who_connects_from_outside_teaches_nothing_about_whom_the_device_calls():
    learned = known_peers.LearnedPeers(b"secret")
    seen_often(learned, address(1), opened=False)
    assert not learned.is_new(address(1), opened=False), "a visitor who came often is an ordinary visitor"
    assert learned.is_new(address(1)), "the day the device calls it, it is new"
    assert len(learned) == 0


def test_outsiders_push_no_known_peer_out():
    learned = known_peers.LearnedPeers(b"secret")
    for i in range(20):
        seen_often(learned, address(i))
    for i in range(2000):
        seen_often(learned, address(5000 + i), opened=False)
    assert not any(learned.is_new(address(i)) for i in range(20))
    assert len(learned._visitors) <= known_peers.MAX_VISITORS
    assert len(learned._visiting) <= known_peers.MAX_CANDIDATES


def test_visitors_are_saved_apart_from_peers():
    learned = known_peers.LearnedPeers(b"secret")
    seen_often(learned, address(1))
    seen_often(learned, address(2), opened=False)
    again = known_peers.LearnedPeers(b"secret")
    again.restore(learned.dump())
    assert not again.is_new(address(1))
    assert not again.is_new(address(2), opened=False)
    assert again.is_new(address(2))


def test_what_was_learned_survives_a_restart_as_hashes_of_this_device_only():
    learned = known_peers.LearnedPeers(b"secret")
    for _ in range(known_peers.KNOWN_AFTER):
        learned.is_new(address(7))
    saved = learned.dump()
    assert len(saved) == 8
    assert address(7)[-4:] not in saved
    again, other_device = known_peers.LearnedPeers(b"secret"), known_peers.LearnedPeers(b"another")
    again.restore(saved)
    other_device.restore(saved)
    assert not again.is_new(address(7))
    assert other_device.is_new(address(7))


@pytest.mark.parametrize("saved", [b"1234567", bytes(8 * known_peers.MAX_KNOWN + 8), 5, None, "12345678"])
def test_what_was_not_saved_by_dump_is_refused(saved):
    with pytest.raises(CollectorError, match="learned peers"):
        known_peers.LearnedPeers(b"secret").restore(saved)
