"""The channel of lasting peers, on every interpreter that a board has."""

from stonechat.detection import ALARM, NORMAL, WATCH
from stonechat.lasting_peers import CONTACTS, LASTS_S, LastingPeers
from stonechat.state import State

OWN = 11
STRANGER = 77


class Collector:
    contacts = ()


def fresh(window_s=60, hours=1, most=8, state=None):
    return LastingPeers(Collector(), window_s * 1000, state, hours, most)


def live(peers, windows):
    """-> the verdict after these windows: each a list of contacts."""
    verdict = peers.verdict
    for contacts in windows:
        peers._contacts.contacts = contacts
        verdict = peers.end_window(0)
    return verdict


def watching(window_s=60, most=8, state=None):
    """One that has learned OWN for its hour."""
    peers = fresh(window_s, most=most, state=state)
    assert live(peers, [[OWN]] * (3600 // window_s)).level == NORMAL
    return peers


def beacon(window_s, period_s, number):
    """The windows of so many beacons."""
    return ([[OWN, STRANGER]] + [[OWN]] * (period_s // window_s - 1)) * number


def test_a_beacon_to_a_new_host_is_found_within_fifteen():
    for window_s in (5, 60):
        peers = watching(window_s)
        number = 0
        verdict = peers.verdict
        while verdict.level != ALARM and number < 16:
            number += 1
            verdict = live(peers, beacon(window_s, 60, 1))
        assert CONTACTS <= number < 15
        assert verdict.evidence_q8 == 256 and verdict.explain(1)[0][0] == 0
        assert live(peers, beacon(window_s, 60, 100)).level == ALARM


def test_an_own_peer_is_none():
    peers = watching()
    assert live(peers, [[OWN]] * 200).level == NORMAL


def test_what_is_met_while_it_learns_is_own_but_under_suspicion():
    peers = fresh()
    live(peers, [[OWN, STRANGER]] * 60)
    assert live(peers, [[OWN, STRANGER]] * 60).level == NORMAL
    peers = fresh()
    peers.hold_peers(True)
    live(peers, [[OWN, STRANGER]] * 60)
    peers.hold_peers(False)
    assert live(peers, [[OWN, STRANGER]]).level == ALARM


def test_a_short_visit_and_rare_ones_are_none():
    assert live(watching(5), [[STRANGER]] * (LASTS_S // 5 - 1)).level == WATCH
    assert live(watching(5), [[STRANGER]] * 20 + [[]] * 3000).level == NORMAL
    assert live(watching(), ([[STRANGER]] + [[]] * 20) * 50).level == NORMAL


def test_gaps_of_a_jittered_beacon_do_not_end_it():
    peers = watching(5)
    pauses = (4, 20, 12, 17, 7, 22, 3, 18, 12, 20, 5, 17, 11)
    assert live(peers, [window for pause in pauses for window in [[STRANGER]] + [[]] * pause]).level == ALARM


def test_an_alarm_ends_with_its_episode():
    peers = watching()
    assert live(peers, [[STRANGER]] * 20).level == ALARM
    verdict = live(peers, [[]] * 11)
    assert verdict.level == NORMAL and verdict.evidence_q8 == 0 and verdict.explain(1) == []


def test_was_normal_makes_it_own():
    peers = watching()
    assert live(peers, [[STRANGER]] * 20).level == ALARM
    peers.clear_evidence()
    assert peers.verdict.level == NORMAL
    assert live(peers, [[STRANGER]] * 50).level == NORMAL
    assert live(peers, [[STRANGER, 5]] * 20).level == ALARM


def test_calibrate_learns_again():
    peers = watching()
    live(peers, [[STRANGER]] * 20)
    peers.recalibrate()
    assert live(peers, [[STRANGER, 6]] * 60).level == NORMAL
    assert live(peers, [[STRANGER, 6]] * 60).level == NORMAL


def test_a_spray_pushes_no_beacon_out_that_was_met_twice_and_takes_no_memory():
    peers = watching(most=64)
    live(peers, [[STRANGER]] * 2)
    at = 1000
    for _ in range(20):
        spray = list(range(at, at + 100))
        at += 100
        verdict = live(peers, [spray, [STRANGER] + spray, spray])
    assert verdict.level == ALARM
    assert len(peers._episodes) <= 16 and len(peers._own) <= 64


def test_own_peers_are_bounded():
    peers = fresh(most=8)
    live(peers, [list(range(i, i + 4)) for i in range(60)])
    assert len(peers._own) == 8


def test_what_was_learned_and_an_episode_survive_a_restart():
    state = State()
    peers = watching(state=state)
    live(peers, [[OWN, STRANGER]] * 6)
    peers.save(state)
    again = fresh(state=state)
    assert live(again, [[OWN, STRANGER]] * 3).level == WATCH
    assert live(again, [[OWN, STRANGER]]).level == ALARM
    assert live(again, [[OWN]] * 60).level == NORMAL


def test_a_damaged_state_starts_afresh():
    for packed in (b"", b"x" * 7, b"\xff" * 40, b"\0\0\0\1\0\0\0\2\0\0\0\1"):
        state = State()
        state.put(b"peers" + LastingPeers.schema.id, packed)
        peers = fresh(state=state)
        assert len(peers._own) <= 8
        live(peers, [[OWN]] * 3)
