"""The hook: what it counts, and that it can't be distinguished from the modules that it replaces.

The hook itself is for MicroPython; on CPython only what it counts with is tested here.
"""

import os
import sys
import time

from stonechat.board import hooks
from stonechat.board.schema import COLUMNS, MICROPYTHON_1
from stonechat.errors import CollectorError

KNOWN_AFTER, MAX_KNOWN, MAX_CANDIDATES, MAX_SEEN = 12, 48, 48, 64
ON_BOARD = sys.implementation.name == "micropython"
NAMES = [column[0] for column in COLUMNS]


def reading(collector):
    values = [0] * len(collector.schema)
    collector.read(values)
    return dict(zip(NAMES, values))


def hooked(work):
    """work(socket module) under the hook -> (what it returned, the counters by name)."""
    counter = hooks.install()
    try:
        import socket

        result = work(socket)
        return result, reading(counter)
    finally:
        hooks.remove()


def listener(socket):
    stream = socket.socket()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    while True:
        number = os.urandom(2)
        port = 20000 + (number[0] << 8 | number[1]) % 12000
        try:
            stream.bind(socket.getaddrinfo("127.0.0.1", port)[0][-1])
        except OSError:
            continue
        stream.listen(4)
        return stream, port


def address(socket, port, host="127.0.0.1"):
    return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)[0][-1]


def outcome(call):
    """What a call gave: ("value", v) or ("error", type, arguments)."""
    try:
        return "value", call()
    except Exception as error:
        return "error", type(error), error.args


def talk(socket):
    """A conversation with every call of a socket -> all that came back."""
    server, port = listener(socket)
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(2)
    told = [client.connect(address(socket, port))]
    peer, _ = server.accept()
    told.append(client.send(b"one"))
    told.append(client.write(b"two\nthree\n"))
    told.append(peer.recv(3))
    told.append(peer.readline())
    told.append(peer.readline())
    told.append(peer.write(b"abcdefgh"))
    buffer = bytearray(4)
    told.append(client.readinto(buffer))
    told.append(bytes(buffer))
    told.append(client.read(4))
    peer.setblocking(False)
    told.append(peer.read(1))
    told.append(outcome(lambda: peer.recv(1)))
    told.append(outcome(lambda: peer.no_such_method))
    told.append(outcome(lambda: socket.socket(99).close()))  # lwIP takes any family
    told.append(client.close())
    told.append(peer.read(1))
    peer.close()
    server.close()
    told.append(outcome(lambda: socket.socket().connect(address(socket, port))))
    told.append(outcome(lambda: socket.getaddrinfo("no-such-host.invalid", 1)))
    return told


def test_columns_stand_where_the_hook_counts():
    board = hooks.FirmwareCollector.schema
    assert (board.name, board.id, tuple(board.kinds)) == (MICROPYTHON_1.name, MICROPYTHON_1.id, MICROPYTHON_1.kinds)
    assert len(board) == len(MICROPYTHON_1)
    for place, name in (
        (
            (hooks._SOCKETS, "sockets"),
            (hooks._UNANSWERED, "conn_unanswered"),
            (hooks._LOOKUP_FAIL, "lookup_fail"),
            (hooks._NEW_PEER_BYTES, "new_peer_bytes"),
            (hooks._WRITES, "writes"),
            (hooks._OPENS_WRITE, "opens_write"),
        )
        if hasattr(hooks, "_SOCKETS")
        else ()
    ):
        assert NAMES[place] == name


def test_same_bytes_and_exceptions_with_and_without_the_hook():
    if not ON_BOARD:
        return
    import socket

    bare = talk(socket)
    under, seen = hooked(talk)
    assert under == bare, (under, bare)
    odd_family = bare[13] == ("value", None)
    assert seen["sockets"] == 3 + odd_family  # listener, client, the one that was refused
    assert seen["conn_out"] == 2
    assert seen["conn_refused"] == 1
    assert seen["conn_in"] == 1
    assert seen["listens"] == 1
    assert seen["lookup_fail"] == 1
    assert seen["bytes_out"] == 3 + 10 + 8
    assert seen["bytes_in"] == 3 + 4 + 6 + 4 + 4
    assert seen["writes"] == 3
    assert seen["mean_write"] == 7
    assert seen["peers"] == 1
    assert seen["new_peers"] == 1
    assert seen["new_peer_bytes"] == 13  # what the client sent; an accepted socket has no new peer


def test_datagrams_and_distinct_ports():
    if not ON_BOARD:
        return

    def flood(socket):
        stream = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for port in range(20000, 20010):
            stream.sendto(b"x" * 100, address(socket, port))
        stream.sendto(b"y", address(socket, 20000, "127.0.0.2"))
        stream.close()

    _, seen = hooked(flood)
    assert seen["udp_out"] == 11
    assert seen["bytes_out"] == 1001
    assert seen["dports"] == 10
    assert seen["peers"] == 2
    assert seen["conn_mute"] == 0


def test_a_connection_that_hears_nothing_is_mute():
    if not ON_BOARD:
        return

    def scan(socket):
        server, port = listener(socket)
        for _ in range(3):
            client = socket.socket()
            client.connect(address(socket, port))
            client.close()
            client.close()
        server.close()

    assert hooked(scan)[1]["conn_mute"] == 3


def test_open_is_counted_and_unchanged():
    if not ON_BOARD:
        return
    name = "hook-test.tmp"

    def work(_):
        with open(name, "w") as file:
            file.write("abc")
        with open(name) as file:
            text = file.read()
        with open(name, mode="rb") as file:
            raw = file.read()
        os.remove(name)
        return text, raw, outcome(lambda: open(name)), outcome(lambda: open(name, "q"))

    bare = work(None)
    under, seen = hooked(work)
    assert under == bare
    assert seen["opens"] == 5
    assert seen["opens_write"] == 2  # "q" is none, but it is not plain reading either


def test_one_line_turns_it_off_and_twice_does_no_harm():
    if not ON_BOARD:
        return
    import builtins
    import socket as before

    plain_open = builtins.open
    first = hooks.install()
    assert hooks.install() is first
    import socket as under

    assert under is not before
    assert hooks.real_socket is before
    hooks.remove()
    hooks.remove()
    import socket as after

    assert after is before
    assert builtins.open is plain_open


def test_quiet_counts_nothing():
    if not ON_BOARD:
        return

    def work(socket):
        hooks.active.quiet = hooks.get_ident()
        talk(socket)
        hooks.active.quiet = None

    _, seen = hooked(work)
    assert sum(value for name, value in seen.items() if name != "heap_free") == 0, seen


def test_asyncio_client_and_server():
    if not ON_BOARD:
        return
    import asyncio

    def work(socket):
        chosen, port = listener(socket)
        chosen.close()
        heard = []

        async def serve(reader, writer):
            heard.append(await reader.readline())
            writer.write(b"answer " + b"z" * 3000 + b"\n")
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        async def ask():
            server = await asyncio.start_server(serve, "127.0.0.1", port)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"question\n")
            await writer.drain()
            heard.append(await reader.read(-1))
            writer.close()
            await writer.wait_closed()
            server.close()
            await server.wait_closed()
            return heard

        return asyncio.run(ask())

    import socket

    bare = work(socket)
    under, seen = hooked(work)
    assert under == bare
    assert under[0] == b"question\n" and len(under[1]) == 3008
    assert seen["bytes_in"] == seen["bytes_out"] == 9 + 3008
    assert seen["conn_in"] == 1


def wait_for(done, number):
    """Until `done` has that many entries; what a thread raised is one."""
    began = time.ticks_ms()
    while len(done) < number:
        assert time.ticks_diff(time.ticks_ms(), began) < 60000, done
        time.sleep_ms(1)


def test_threads_of_the_firmware_and_the_agent_beside_them():
    """The unix port's threads have no global lock, as those of the RP2040. What the main thread does meanwhile while
    the agent is at work in it is not counted, and what the others do is."""
    if not ON_BOARD:
        return
    import _thread

    names, sent, threads, windows = "hooks-thread-%d.tmp", 200, 4, []
    counter = hooks.install()
    try:
        import socket

        addresses = [address(socket, 9, "127.0.0.%d" % i) for i in range(1, 120)]
        done = []

        def worker(number):
            try:
                for i in range(sent):
                    stream = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    stream.sendto(b"xyz", addresses[(i * number) % len(addresses)])
                    stream.close()
                    if i % 8 == 0:
                        open(names % number, "w").close()
                done.append(None)
            except Exception as error:
                done.append(error)

        reading(counter)
        for number in range(1, threads + 1):
            _thread.start_new_thread(worker, (number,))
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        while len(done) < threads:
            counter.quiet = hooks.get_ident()
            own.sendto(b"the agent's", addresses[0])
            counter.quiet = None
            windows.append(reading(counter))
            assert windows[-1]["peers"] <= MAX_SEEN and len(counter.known) <= MAX_KNOWN
        own.close()
        assert done == [None] * threads, done
        last = reading(counter)
    finally:
        hooks.remove()
        for number in range(1, threads + 1):
            try:
                os.remove(names % number)
            except OSError:
                pass
    assert len(windows) > 3
    assert last["udp_out"] == last["writes"] == threads * sent, last
    assert last["bytes_out"] == 3 * threads * sent
    assert last["sockets"] == threads * sent + 1
    assert last["opens"] == last["opens_write"] == threads * sent // 8


def test_a_callback_in_the_middle_of_counting_does_not_wait_for_itself():
    """Timers and interrupts hand their work to the scheduler, which runs it between two steps of any program."""
    if not ON_BOARD:
        return
    import _thread

    import micropython

    counter = hooks.install()
    try:
        import socket

        stream = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        place = address(socket, 9)
        ran, done, stop = [0, 0], [], []

        def callback(_):
            reading(counter)  # as a Timer's tick does
            stream.sendto(b"b", place)
            ran[0] += 1

        def interrupt():
            while not stop:
                try:
                    micropython.schedule(callback, None)
                    ran[1] += 1
                except RuntimeError:  # the queue is full
                    pass
                time.sleep_us(100)
            done.append(None)

        reading(counter)
        _thread.start_new_thread(interrupt, ())
        number = 0
        while ran[0] < 100 or number < 500:
            stream.sendto(b"a", place)
            number += 1
        stop.append(None)
        wait_for(done, 1)
        while ran[0] < ran[1]:
            time.sleep_ms(1)  # what is scheduled still runs
        assert reading(counter)["udp_out"] == number + ran[0]
    finally:
        hooks.remove()


def counter_with(secret):
    counter = hooks.FirmwareCollector()
    counter.secret = secret
    return counter


def meet(counter, *address):
    """As sendto() does before it fails."""
    key, port = counter.meet(address)
    counter.add(hooks._UDP_OUT if hasattr(hooks, "_UDP_OUT") else 18, key=key, port=port)


def test_peers_become_known_after_enough_windows():
    counter = counter_with(b"k")
    for window in range(KNOWN_AFTER + 2):
        before = counter.counts[10]
        meet(counter, "10.0.0.1", 80)
        new = counter.counts[10] - before
        assert new == (1 if window < KNOWN_AFTER else 0), window
        assert reading(counter)["peers"] == 1


def test_what_was_learned_survives_and_means_nothing_elsewhere():
    counter = counter_with(b"k")
    for _ in range(KNOWN_AFTER):
        meet(counter, "10.0.0.1", 80)
        meet(counter, "10.0.0.2", 80)
        reading(counter)
    saved = counter.dump()
    assert len(saved) == 8
    for secret, new in ((b"k", 0), (b"other", 2)):
        other = counter_with(secret)
        other.restore(saved)
        meet(other, "10.0.0.1", 80)
        meet(other, "10.0.0.2", 80)
        assert reading(other)["new_peers"] == new


def test_a_peer_that_was_met_before_the_agent_started_has_the_devices_own_key():
    counter = counter_with(b"boot")
    address = ("10.0.0.1", 80)
    before = counter.meet(address)
    assert counter.meet(address) == before
    counter.secret = b"k"  # as start() does
    reading(counter)
    assert counter.meet(address) == counter_with(b"k").meet(address) != before


def test_damaged_peers_are_refused():
    counter = counter_with(b"k")
    for damaged in (b"abc", bytes(4 * MAX_KNOWN + 4)):
        try:
            counter.restore(damaged)
        except CollectorError:
            continue
        raise AssertionError(damaged)


def test_a_scan_teaches_nothing_and_everything_stays_bounded():
    counter = counter_with(b"k")
    for window in range(20):
        for i in range(300):
            meet(counter, "10.%d.%d.%d" % (window, i >> 8, i & 255), 1000 + i)
        seen = reading(counter)
        assert seen["peers"] == seen["dports"] == MAX_SEEN
        assert seen["new_peers"] == 300 * (window + 1)
    assert len(counter._candidates) <= MAX_CANDIDATES
    assert counter.dump() == b""


def test_known_peers_are_bounded_and_the_longest_unseen_goes():
    counter = counter_with(b"k")
    hosts = ["10.0.0.%d" % i for i in range(MAX_KNOWN + 1)]
    for some in (hosts[:30], hosts[30:]):
        for _ in range(KNOWN_AFTER):
            for host in some:
                meet(counter, host, 80)
            reading(counter)
    assert len(counter.dump()) == 4 * MAX_KNOWN


def test_nobody_becomes_known_under_suspicion():
    counter = counter_with(b"k")
    counter.hold_peers(True)
    for _ in range(KNOWN_AFTER + 1):
        meet(counter, "10.0.0.1", 80)
        reading(counter)
    assert counter.dump() == b""


def test_lag_is_the_longest_turn():
    counter = counter_with(b"k")
    for now_ms in (0, 10, 200, 210):
        counter.beat(now_ms)
    assert reading(counter)["loop_lag"] == 190
    counter.beat(225)
    assert reading(counter)["loop_lag"] == 15


def test_counters_wrap_as_small_ints():
    counter = hooks.FirmwareCollector()
    counter.add(15, 0x3FFFFFFF)
    counter.add(15, b"ab")
    assert counter.counts[13] == 1
    assert counter.counts[15] == 2


def test_packed_addresses_of_the_unix_port():
    four = bytearray(b"\x02\x00\x1f\x90\x0a\x00\x00\x07" + bytes(8))
    six = bytearray(b"\x0a\x00\x01\xbb\x00\x00\x00\x00" + b"\xfe\x80" + bytes(14) + bytes(4))
    counter = counter_with(b"k")
    assert counter.meet(four) == counter.meet((b"\x0a\x00\x00\x07", 8080))
    assert counter.meet(six) == counter.meet((b"\xfe\x80" + bytes(14), 443))
    assert counter.meet(("10.0.0.1", 53)) == counter.meet((b"10.0.0.1", 53))
    assert counter.meet(("10.0.0.1", 53))[0] != counter.meet(("10.0.0.2", 53))[0]
    assert counter.meet(four)[1] == 8080 and counter.meet(six)[1] == 443
    for odd in (None, 5, "10.0.0.1:53", (), ("10.0.0.1",), (None, 53), ([], 53), ("10.0.0.1", "53"), b"", b"ab", {}):
        assert counter.meet(odd) == (None, None), odd
