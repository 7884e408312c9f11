"""The channel of lasting peers where a contact does not end."""

from stonechat.detection import ALARM, NORMAL
from stonechat.linux.steady_peers import SteadyPeers
from stonechat.state import State

OWN, STRANGER, ANOTHER = 11, 77, 78


class Collector:
    contacts: list[int] = []


def fresh(window_s: int, state: State | None = None) -> SteadyPeers:
    return SteadyPeers(Collector(), window_s * 1000, 1).open(state)


def live(peers: SteadyPeers, windows: list[list[int]]):
    """-> the verdict after these windows: each a list of contacts."""
    verdict = peers.verdict
    for contacts in windows:
        peers._collector.contacts = contacts
        verdict = peers.end_window(0)
    return verdict


def beacon(window_s: int, number: int, others: tuple[int, ...] = ()) -> list[list[int]]:
    return ([[OWN, STRANGER, *others]] + [[OWN]] * (60 // window_s - 1)) * number


def test_an_alarm_of_an_hour_is_steady_until_it_ends_or_an_operator_answers():
    for window_s in (5, 60):
        state = State()
        peers = fresh(window_s, state)
        assert live(peers, [[OWN]] * (3600 // window_s)).level == NORMAL
        assert live(peers, beacon(window_s, 40)).level == ALARM and not peers.steady
        verdict = live(peers, beacon(window_s, 50))
        assert peers.steady and verdict.steady and verdict.level == NORMAL and peers.age * window_s >= 3600
        assert live(peers, beacon(window_s, 12, (ANOTHER,))).level == ALARM  # another one is found as before
        assert live(peers, beacon(window_s, 14)).level == NORMAL and peers.steady
        peers.save(state)
        again = fresh(window_s, state)
        assert live(again, beacon(window_s, 2)).level == ALARM  # for an hour again
        assert live(again, beacon(window_s, 75)).level == NORMAL and again.steady
        again.clear_evidence()
        assert live(again, beacon(window_s, 20)).level == NORMAL and not again.steady
        verdict = live(peers, [[OWN]] * (660 // window_s))
        assert not peers.steady and not verdict.steady and peers.age == 0  # it has not been met any more
        assert live(peers, beacon(window_s, 20)).level == ALARM


def test_a_host_that_comes_and_goes_is_no_way_around():
    """Silent for eleven minutes after each hour: it alarms anew each time."""
    peers = fresh(60)
    live(peers, [[OWN]] * 60)
    for _ in range(3):
        assert live(peers, beacon(60, 12)).level == ALARM
        live(peers, beacon(60, 70))
        assert peers.steady
        live(peers, [[OWN]] * 11)
        assert not peers.steady
