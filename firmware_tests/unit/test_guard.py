"""The guard in the socket hook, with real sockets on loopback: strangers at 127.66.0.6, the learned at 127.0.0.1. The
hook is for MicroPython; on CPython only the decision is tested here."""

import errno
import time

from stonechat.board import guard, hooks
from stonechat.compat import ticks_ms
from stonechat.policy import DRY_RUN, ON, QUARANTINE, THROTTLE
from test_hooks import ON_BOARD, address, listener, outcome, reading

STRANGER = "127.66.0.6"
REFUSED = ("error", OSError, (errno.EHOSTUNREACH,))


def guarded(work, action, seconds=60, allow=()):
    """work(socket module, port of the learned, port of the stranger, the Guard) while `action` is in force -> what it
    returned, the counters by name."""
    if not ON_BOARD:
        return None, None
    counter = hooks.install()
    made = []
    try:
        import socket

        home, port = listener(socket)
        stranger = socket.socket()
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(address(socket, port, STRANGER))
        stranger.listen(128)
        home.listen(128)
        made += [home, stranger]
        key, _ = counter.meet(address(socket, port))
        counter.known[key] = 0
        one = guard.Guard(allow)
        before = hooks.socket.connect, hooks.socket.send
        one.apply(action, seconds)
        try:
            result = work(socket, port, one)
        finally:
            one.release()
        assert (hooks.socket.connect, hooks.socket.send) == before  # nothing of it stays
        return result, reading(counter)
    finally:
        for stream in made:
            stream.close()
        hooks.remove()


def tried(socket, port, host, times=1):
    """-> what connect() gave, `times` times."""
    seen = []
    for _ in range(times):
        stream = socket.socket()
        stream.settimeout(1)
        seen.append(outcome(lambda stream=stream: stream.connect(address(socket, port, host))))
        stream.close()
    return seen


def test_in_quarantine_the_learned_is_reached_and_a_stranger_is_not():
    def work(socket, port, one):
        stream = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sent = outcome(lambda: stream.sendto(b"x", address(socket, port, STRANGER)))
        home = outcome(lambda: stream.sendto(b"x", address(socket, port)))
        stream.close()
        return tried(socket, port, "127.0.0.1", 20), tried(socket, port, STRANGER, 20), sent, home, one.counts()

    result, counted = guarded(work, QUARANTINE)
    if not ON_BOARD:
        return
    home, strange, sent, sent_home, counts = result
    assert home == [("value", None)] * 20 and sent_home == ("value", 1)
    assert strange == [REFUSED] * 20 and sent == REFUSED
    assert counts == (0, 21)
    assert counted["conn_out"] == 40 and counted["conn_unanswered"] == 21 and counted["udp_out"] == 2  # still evidence


def test_a_throttle_lets_some_through_and_costs_the_learned_nothing():
    def work(socket, port, one):
        first = tried(socket, port, STRANGER, 30)
        time.sleep(0.6)
        return first, tried(socket, port, STRANGER, 10), tried(socket, port, "127.0.0.1", 40)

    result, _ = guarded(work, THROTTLE)
    if not ON_BOARD:
        return
    first, later, home = result
    assert 8 <= first.count(("value", None)) <= 11 and first.count(REFUSED) == 30 - first.count(("value", None))
    assert 1 <= later.count(("value", None)) <= 5
    assert home == [("value", None)] * 40


def test_an_open_connection_to_a_stranger_is_reset_and_one_to_the_learned_goes_on():
    def work(socket, port, one):
        one.release()
        streams = []
        for host in (STRANGER, "127.0.0.1"):
            stream = socket.socket()
            stream.connect(address(socket, port, host))
            streams.append(stream)
        one.apply(QUARANTINE, 60)
        got = [outcome(lambda call=call: call(b"abc")) for stream in streams for call in (stream.send, stream.write)]
        for stream in streams:
            stream.close()
        return got

    result, _ = guarded(work, QUARANTINE)
    if ON_BOARD:
        assert result == [("error", OSError, (errno.ECONNRESET,))] * 2 + [("value", 3)] * 2


def test_it_ends_by_the_clock_without_anybody():
    def work(socket, port, one):
        before = tried(socket, port, STRANGER)
        time.sleep(1.1)
        return before, tried(socket, port, STRANGER, 20), hooks.socket.connect

    result, _ = guarded(work, QUARANTINE, 1)
    if ON_BOARD:
        before, after, connect = result
        assert before == [REFUSED] and after == [("value", None)] * 20


def test_extended_it_lasts():
    def work(socket, port, one):
        time.sleep(0.6)
        one.extend(1)
        time.sleep(0.6)
        return tried(socket, port, STRANGER)

    result, _ = guarded(work, QUARANTINE, 1)
    assert not ON_BOARD or result == [REFUSED]


def test_what_the_agent_does_passes():
    def work(socket, port, one):
        hooks.active.quiet = hooks.get_ident()
        own = tried(socket, port, STRANGER)
        hooks.active.quiet = None
        return own, tried(socket, port, STRANGER)

    result, _ = guarded(work, QUARANTINE)
    assert not ON_BOARD or result == ([("value", None)], [REFUSED])


def test_what_the_product_allows_is_reached():
    result, _ = guarded(lambda socket, port, one: tried(socket, port, STRANGER, 20), QUARANTINE, 60, (STRANGER,))
    assert not ON_BOARD or result == [("value", None)] * 20


def test_a_nonsense_address_gives_the_error_that_it_gives_without_the_guard():
    def work(socket, port, one):
        seen = [outcome(lambda bad=bad: socket.socket().connect(bad)) for bad in (None, 7, (1,))]
        one.release()
        assert seen == [outcome(lambda bad=bad: socket.socket().connect(bad)) for bad in (None, 7, (1,))]

    guarded(work, QUARANTINE)


def test_the_decision_alone():
    counter = hooks.FirmwareCollector()
    kept, hooks.active = hooks.active, counter
    try:
        one = guard.Guard()
        one._until_ms = ticks_ms() + 60_000
        one._action = QUARANTINE
        one._milli = 2000
        one._last_ms = ticks_ms()
        counter.known = {5: 0}
        assert one._lets(5) and not one._lets(6)
        assert [one._lets(None) for _ in range(4)] == [True, True, False, False]  # who came by itself is limited
        assert one.counts() == (2, 3)
    finally:
        hooks.active = kept


def test_a_board_s_response_knows_its_families():
    made = guard.respond(mode=ON)
    assert made.mode == ON and made.enforcer is not None
    assert len(made._families[hooks.Columns.id]) == len(hooks.Columns()) and guard.respond().mode == DRY_RUN
