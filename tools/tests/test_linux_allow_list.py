"""The allow-list: what is on it on any system, whatever its files say, and when the broker or DNS count as dead."""

import datetime
import random
import socket
import time
from pathlib import Path

import pytest
from stonechat.linux import allow_list
from stonechat.linux.allow_list import AllowList, Names, check, packed, parse_network, parse_until

BROKER = "192.0.2.10"
ROUTE = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
GATEWAY = "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
LINK = "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"


class System:
    """Folders in place of /etc, /run and /proc."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.proc = folder / "proc"
        for path in (self.root / "etc/systemd", self.root / "run/systemd/resolve", self.proc / "net"):
            path.mkdir(parents=True)
        self.write("etc/resolv.conf", "# by hand\nnameserver 192.0.2.53\noptions edns0\n")
        self.net("route", ROUTE + GATEWAY + LINK)

    def write(self, path: str, text: str) -> None:
        (self.root / path).write_text(text)

    def net(self, name: str, text: str) -> None:
        (self.proc / "net" / name).write_text(text)

    def list(self, operator=(), host=BROKER, peers=None) -> AllowList:
        return AllowList(host, 8883, list(operator), peers, root=str(self.root), proc=str(self.proc))

    def tcp(self, address: str, state: str = "01", retransmits: int = 0, port: int = 8883) -> None:
        word = socket.inet_aton(address)[::-1].hex().upper()
        row = f"   0: 0100007F:1F90 {word}:{port:04X} {state} 00000000:00000000 00:00000000 {retransmits:08X}  0 0 1\n"
        self.net("tcp", "  sl  local_address rem_address   st tx_queue\n" + row)


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def reasons(found: AllowList) -> dict[str, set[str]]:
    by_reason: dict[str, set[str]] = {}
    for network, what, reason in found.lines():
        by_reason.setdefault(reason, set()).add(f"{network} {what}")
    return by_reason


def test_what_is_on_it_by_default(system):
    system.write("run/systemd/resolve/resolv.conf", "nameserver 2001:db8::53\nnameserver 192.0.2.53\n")
    system.write("etc/systemd/timesyncd.conf", "[Time]\nNTP=192.0.2.123 ntp.invalid\n#FallbackNTP=198.51.100.1\n")
    system.net("ipv6_route", f"{'0' * 32} 00 {'0' * 32} 00 fe80{'0' * 26}01 00000400 1 0 00000003     eth0\n")
    found = system.list([{"address": "198.51.100.0/24", "reason": "office"}])
    dns = {f"{host} {what}" for host in ("192.0.2.53", "2001:db8::53") for what in ("udp 53", "tcp 53", "tcp 853")}
    assert reasons(found) == {
        "broker": {"192.0.2.10 tcp 8883"},
        "DNS": dns,
        "gateway": {"192.0.2.1 all", "fe80::1 all"},
        "NTP": {"192.0.2.123 udp 123"},
        "office": {"198.51.100.0/24 all"},
    }
    assert found.entries() == system.list([{"address": "198.51.100.0/24", "reason": "office"}]).entries()  # a restart


def test_it_follows_a_change_of_network(system):
    found = system.list()
    before = found.entries()
    system.write("etc/resolv.conf", "nameserver 203.0.113.53\n")
    system.net("route", ROUTE + GATEWAY.replace("010200C0", "017100CB"))
    after = found.entries()
    assert (packed("203.0.113.1"), 32, 0, 0) in after
    assert (packed("203.0.113.53"), 32, 17, 53) in after
    assert (packed("192.0.2.1"), 32, 0, 0) in before
    assert (packed("192.0.2.1"), 32, 0, 0) not in after
    assert (packed(BROKER), 32, 6, 8883) in after


def test_loopback_and_nobody_are_left_out(system):
    system.write("etc/resolv.conf", "nameserver 127.0.0.53\nnameserver ::1\nnameserver 0.0.0.0\nnameserver ::\n")
    assert "DNS" not in reasons(system.list())


@pytest.mark.parametrize("seed", range(20))
def test_no_system_file_breaks_it(system, seed):
    rng = random.Random(seed)
    words = [
        b"nameserver",
        b"server",
        b"NTP=",
        b"00000000",
        b"0" * 32,
        b"00",
        b"01",
        b"-1",
        b"\xff\xfe",
        b"::",
        b"\n",
        b"\t",
    ]
    for path in ("root/etc/resolv.conf", "root/etc/systemd/timesyncd.conf", "proc/net/route", "proc/net/ipv6_route"):
        data = b"".join(rng.choice((b" ", b"\n", b"")) + rng.choice((*words, rng.randbytes(9))) for _ in range(4000))
        (system.root.parent / path).write_bytes(data)
    parts = (b" ", b" ", b"\n", b"01", b":22B3", b"0A0200C0:22B3", b"\xff:22B3", b"zz")
    tcp = b"".join(rng.choice(parts) for _ in range(3000))
    (system.proc / "net/tcp").write_bytes(tcp)
    found = system.list()
    made = found.entries()
    assert (packed(BROKER), 32, 6, 8883) in made
    assert len(made) < 64
    found.began()
    found.watch()
    assert found.essential() in (True, False)


def test_a_long_list_of_servers_is_cut(system):
    system.write("etc/resolv.conf", "".join(f"nameserver 192.0.2.{i}\n" for i in range(1, 200)))
    assert len(reasons(system.list())["DNS"]) == 3 * allow_list.MAX_SERVERS


# --- the operator's entries -------------------------------------------------------------------------------------------


def test_an_entry_ends_and_one_without_end_does_not(system, monkeypatch):
    rows = [
        {"address": "198.51.100.7", "reason": "visitor", "until": "2027-01-31"},
        {"address": "198.51.100.8", "reason": "for ever"},
    ]
    found = system.list(rows)
    end_s = int(datetime.datetime(2027, 2, 1, tzinfo=datetime.UTC).timestamp())
    for now_s, visitor in ((end_s - 1, True), (end_s, False), (0, True)):  # 0: the clock is not set
        monkeypatch.setattr(allow_list, "epoch_s", lambda now_s=now_s: now_s)
        assert ("visitor" in reasons(found)) == visitor
        assert "for ever" in reasons(found)


@pytest.mark.parametrize("text", ["2027-01-31", "2028-02-29", "2024-12-31", "2099-12-31", "2020-01-01"])
def test_until_is_the_end_of_the_day(text):
    day = datetime.date.fromisoformat(text) + datetime.timedelta(days=1)
    assert parse_until(text) == int(datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC).timestamp())


@pytest.mark.parametrize(
    "text", ["", "2027-02-29", "2027-13-01", "2027-1-1", "27-01-01", "1999-01-01", "²027-01-01", "soon"]
)
def test_until_that_is_no_day(text):
    with pytest.raises(ValueError, match="must be a day such as"):
        parse_until(text)


def test_networks():
    assert parse_network("192.0.2.7") == (bytes((192, 0, 2, 7)), 32)
    assert parse_network("10.0.0.0/8") == (bytes((10, 0, 0, 0)), 8)
    assert parse_network("2001:db8::/32") == (packed("2001:db8::"), 32)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("office", "no address"),
        ("192.0.2", "no address"),
        ("192.0.2.7/24", "write 192.0.2.7 for this address alone"),
        ("0.0.0.0/0", "from 8 to 32"),
        ("::/0", "from 16 to 128"),
        ("192.0.2.0/33", "from 8 to 32"),
        ("192.0.2.0/", "from 8 to 32"),
        ("192.0.2.0/2x", "from 8 to 32"),
        ("192.0.2.0/" + "9" * 5000, "from 8 to 32"),
        ("x" * 5000, "no address"),
        ("192.0.2.7\0", "no address"),
    ],
)
def test_networks_that_are_none(text, says):
    with pytest.raises(ValueError, match=says) as caught:
        parse_network(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("192.0.2.7", "a list like"),
        (["192.0.2.7"], "a list like"),
        ([{"address": "192.0.2.7"}], "address and reason are needed"),
        ([{"address": "192.0.2.7", "reason": " "}], "1 to 200 printable"),
        ([{"address": "192.0.2.7", "reason": "a\nb"}], "1 to 200 printable"),
        ([{"address": "192.0.2.7", "reason": "a", "port": "22"}], "address and reason are needed"),
        ([{"address": "192.0.2.7", "reason": 1}], "a list like"),
        ([{"address": "192.0.2.7", "reason": "a", "until": "x"}], "must be a day"),
        ([{"address": "192.0.2.7", "reason": "a", "essential": "yes"}], "true or false"),
        ([{"address": "192.0.2.7", "reason": "a"}] * 33, "at most 32"),
    ],
)
def test_entries_that_are_none(value, says):
    assert says in (check(value) or "")


def test_entries_that_are_good():
    assert check([]) is None
    assert check([{"address": "2001:db8::/32", "reason": "office", "until": "2027-01-31"}]) is None
    assert check([{"address": "192.0.2.1", "reason": "vendor", "essential": True}]) is None


# --- names ------------------------------------------------------------------------------------------------------------


class Answers:
    """getaddrinfo with answers of the test's own."""

    def __init__(self, monkeypatch, *answers: list[str] | None) -> None:
        self.answers = list(answers)
        real = allow_list._socket

        class Module:
            AF_INET, AF_INET6, SOCK_STREAM = real.AF_INET, real.AF_INET6, real.SOCK_STREAM
            inet_pton, inet_ntop = staticmethod(real.inet_pton), staticmethod(real.inet_ntop)
            getaddrinfo = staticmethod(self.look_up)

        monkeypatch.setattr(allow_list, "_socket", Module)
        self.asked = 0

    def look_up(self, *_):
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if answer is None:
            raise OSError("no answer")
        return [(2, 1, 6, "", (text, 1)) for text in answer]


def settle(found: AllowList | Names, asked: "Answers", times: int) -> None:
    names = found.names if isinstance(found, AllowList) else found
    deadline_s = time.monotonic() + 20
    while asked.asked < times or names._looking:
        assert time.monotonic() < deadline_s
        names.turn(asked.asked < times)
        time.sleep(0.002)


def test_all_addresses_of_the_broker_and_those_that_it_had(system, monkeypatch):
    asked = Answers(monkeypatch, ["192.0.2.20", "192.0.2.21"], ["192.0.2.22"], None)
    monkeypatch.setattr(allow_list, "RENEW_SOON_MS", 0)
    found = system.list(host="broker.invalid")
    with pytest.raises(OSError, match=r"no address of the broker broker\.invalid is known yet"):
        found.entries()
    settle(found, asked, 1)
    brokers = {"192.0.2.20 tcp 8883", "192.0.2.21 tcp 8883"}
    assert brokers <= reasons(found)["broker"]
    settle(found, asked, 3)
    assert reasons(found)["broker"] == brokers | {"192.0.2.22 tcp 8883"}


def test_check_shows_a_broker_without_an_address(system):
    found = system.list(host="broker.invalid").lines()
    assert ("broker.invalid", "tcp 8883", "broker, once its name is looked up") in found


def test_what_the_client_has_found_counts_at_once(system, monkeypatch):
    asked = Answers(monkeypatch, None)
    found = system.list(host="broker.invalid", peers=lambda: ["192.0.2.30", "fe80::1%eth0", "nonsense"])
    assert (packed("192.0.2.30"), 32, 6, 8883) in found.entries()
    settle(found, asked, 1)


def test_a_broker_whose_name_is_unknown_to_dns_hinders_nothing(system, monkeypatch):
    asked = Answers(monkeypatch, None)
    found = system.list(host="broker.invalid")
    settle(found, asked, 1)
    assert (packed("192.0.2.53"), 32, 17, 53) in found.entries()


def test_an_address_is_forgotten_after_a_day_and_the_number_is_bounded(monkeypatch):
    now_ms = [0]
    monkeypatch.setattr(allow_list, "ticks_ms", lambda: now_ms[0])
    asked = Answers(
        monkeypatch, ["192.0.2.20"], ["192.0.2.21"], *[[f"10.0.{n}.{i}" for i in range(16)] for n in range(9)]
    )
    names = Names({"broker.invalid": 1})
    settle(names, asked, 1)
    now_ms[0] += allow_list.HOLD_MS + 1
    settle(names, asked, 2)
    assert names.of("broker.invalid") == [packed("192.0.2.21")]
    for n in range(3, 12):
        now_ms[0] += allow_list.RENEW_SOON_MS
        settle(names, asked, n)
    assert len(names.of("broker.invalid")) <= 64
    assert packed("10.0.8.15") in names.of("broker.invalid")


def test_no_time_server_takes_the_place_of_the_broker(monkeypatch):
    pools = [[f"10.{n}.{i}.1" for i in range(16)] for n in range(1, 31)]
    asked = Answers(monkeypatch, ["192.0.2.20"], *pools)
    names = Names({"broker.invalid": 1, "a.pool.invalid": 123, "b.pool.invalid": 123})
    settle(names, asked, 1)
    monkeypatch.setattr(allow_list, "RENEW_SOON_MS", 0)
    names._due_ms.pop("broker.invalid")  # not due for a while
    settle(names, asked, 31)
    assert names.of("broker.invalid") == [packed("192.0.2.20")]
    assert all(0 < len(names.of(name)) <= 8 for name in ("a.pool.invalid", "b.pool.invalid"))


def test_the_addresses_that_were_seen_last_are_held(monkeypatch):
    others = [["192.0.2.20", *[f"10.{n}.{i}.1" for i in range(8)]] for n in range(1, 21)]
    asked = Answers(monkeypatch, *others)
    monkeypatch.setattr(allow_list, "RENEW_SOON_MS", 0)
    names = Names({"broker.invalid": 1})
    settle(names, asked, 20)
    assert packed("192.0.2.20") in names.of("broker.invalid") and len(names.of("broker.invalid")) <= 32


@pytest.mark.parametrize("text", ["::ffff:192.0.2.7", "::FFFF:c000:207"])
def test_an_ipv4_address_is_one_however_it_is_written(system, text):
    assert packed(text) == bytes((192, 0, 2, 7))
    assert parse_network(text) == (bytes((192, 0, 2, 7)), 32)
    with pytest.raises(ValueError, match="write an IPv4 network"):
        parse_network(text + "/120")
    assert (packed("192.0.2.7"), 32, 6, 8883) in system.list(host=text).entries()


# --- essential flows --------------------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch):
    ticks = [1000]
    monkeypatch.setattr(allow_list, "ticks_ms", lambda: ticks[0])
    return ticks


@pytest.mark.parametrize("how", ["gone", "unanswered"])
def test_the_broker_s_connection_must_live_on(system, now, how):
    system.tcp(BROKER)
    found = system.list()
    found.began()
    assert found.essential()
    if how == "gone":
        system.tcp("192.0.2.99")
    else:
        system.tcp(BROKER, retransmits=5)
    assert found.essential()  # it may come back
    now[0] += allow_list.DEAD_AFTER_MS
    assert not found.essential()
    found.ended()
    assert not found.essential()  # it has died of it
    system.tcp(BROKER)
    found.began()
    assert found.essential()


@pytest.mark.parametrize(("essential", "lives"), [(True, False), (False, True)])
def test_an_essential_entry_must_live_on_and_another_need_not(system, now, essential, lives):
    system.tcp("198.51.100.7", port=22)
    found = system.list([{"address": "198.51.100.0/24", "reason": "vendor", "essential": essential}])
    found.began()
    assert found.essential()
    system.tcp("198.51.101.7", port=22)
    assert found.essential()
    now[0] += allow_list.DEAD_AFTER_MS
    assert found.essential() == lives


def test_the_broker_s_connection_is_found_among_very_many(system, now):
    system.tcp(BROKER)
    head, row = (system.proc / "net/tcp").read_text().split("\n")[:2]
    others = row.replace(" 01 ", " 06 ").replace("0A0200C0", "070200C6") + " " * 60
    system.net("tcp", "\n".join([head, *[others] * 20_000, row, ""]))
    found = system.list()
    found.began()
    now[0] += 10 * allow_list.DEAD_AFTER_MS
    assert found._essential == [None] and found.essential()
    system.net("tcp", "\n".join([head, *[others] * 20_000, ""]))
    for _ in range(2):
        found.essential()
        now[0] += 2 * allow_list.DEAD_AFTER_MS
    assert not found.essential()


def test_a_time_server_s_silent_name_is_not_the_broker_s(system, now, monkeypatch):
    system.write("etc/ntp.conf", "server slow.invalid\n")
    found = system.list(host="broker.invalid")
    asked = Answers(monkeypatch, ["192.0.2.20"])
    settle(found, asked, 2)
    found.began()
    found.names._looking, found.names._began_ms = "slow.invalid", now[0]
    now[0] += 2 * allow_list.DEAD_AFTER_MS
    assert found.essential()
    found.names._looking = "broker.invalid"
    assert not found.essential()


def test_another_connection_to_the_broker_will_do(system, now):
    system.tcp(BROKER)
    found = system.list(peers=lambda: ["192.0.2.11"])
    found.began()
    system.tcp("192.0.2.11")
    now[0] += 2 * allow_list.DEAD_AFTER_MS
    assert found.essential()


def test_a_connection_that_was_not_there_is_not_missed(system, now):
    system.tcp(BROKER, state="02")
    found = system.list()
    found.began()
    now[0] += 10 * allow_list.DEAD_AFTER_MS
    assert found.essential()


def test_dns_that_was_answered_must_go_on(system, monkeypatch):
    asked = Answers(monkeypatch, ["192.0.2.20"], None)
    monkeypatch.setattr(allow_list, "RENEW_SOON_MS", 0)
    found = system.list(host="broker.invalid")
    settle(found, asked, 1)
    found.began()
    assert found.essential()
    settle(found, asked, 3)
    assert not found.essential()
