"""What is usual on a device, and the limits that follow from it."""

from pathlib import Path

import pytest
from stonechat.linux import usual_rates
from stonechat.linux.netfilter_rules import LIMITS
from stonechat.linux.usual_rates import BUCKET_S, MAX_BUCKETS, NAMES, SPAN_S, UsualRates


class Device:
    """Counters that a test moves, and a clock."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        (folder / "net").mkdir()
        self.now_ms = 1000
        self.opens = self.passive = self.datagrams = self.datagrams_6 = self.sent = 0
        monkeypatch.setattr(usual_rates, "ticks_ms", lambda: self.now_ms)
        self.written: dict[str, str] = {}
        self.write()
        self.rates = UsualRates(str(folder))

    def write(self) -> None:
        row = " ".join(["0"] * 8 + [str(self.sent)] + ["0"] * 7)
        texts = {
            "net/snmp": (
                f"Icmp: InMsgs OutMsgs\nIcmp: 0 0\nTcp: ActiveOpens PassiveOpens\nTcp: {self.opens} {self.passive}\n"
                f"Udp: InDatagrams OutDatagrams\nUdp: 0 {self.datagrams}\n"
            ),
            "net/snmp6": f"Ip6InReceives 7\nIcmp6OutMsgs 0\nUdp6OutDatagrams\t{self.datagrams_6}\nbroken\n",
            "net/dev": f"head\nhead\n    lo: {'9 ' * 16}\n  eth0: {row}\n",
        }
        for name, text in texts.items():
            if self.written.get(name) != text:
                (self.folder / name).write_text(text)
        self.written = texts

    def live(
        self,
        seconds: int,
        sent: int = 0,
        opens: int = 0,
        datagrams: int = 0,
        datagrams_6: int = 0,
        step_s: int = SPAN_S,
    ) -> None:
        for _ in range(0, seconds, step_s):
            self.now_ms += step_s * 1000
            self.sent += sent * step_s
            self.opens += opens * step_s
            self.datagrams += datagrams * step_s
            self.datagrams_6 += datagrams_6 * step_s
            self.write()
            self.rates.turn()


@pytest.fixture
def device(tmp_path, monkeypatch) -> Device:
    return Device(tmp_path, monkeypatch)


def test_a_quiet_device_has_the_least_limits(device):
    assert device.rates.limits(LIMITS) == LIMITS
    device.live(3 * BUCKET_S, sent=1000, opens=1, datagrams=2)
    assert device.rates.limits(LIMITS) == LIMITS
    assert set(LIMITS) == set(NAMES)


def test_a_busy_one_may_do_half_as_much_again(device):
    device.live(3 * BUCKET_S, sent=1_000_000, opens=40, datagrams=200)
    limits = device.rates.limits(LIMITS)
    assert limits["bytes_out"] == (1_500_000, 6_000_000)
    assert limits["connections_out"] == (60, 300)
    assert limits["datagrams"] == (300, 1500)
    assert limits["connections_in"] == LIMITS["connections_in"]


def test_datagrams_of_ipv6_count_where_there_is_no_other(device):
    device.live(3 * BUCKET_S, datagrams_6=200)
    assert device.rates.limits(LIMITS)["datagrams"] == (300, 1500)


def test_no_rate_is_too_large_for_the_kernel(device):
    device.live(3 * BUCKET_S, sent=10**10, opens=10**8)
    assert all(0 < rate < 1 << 30 and 0 < burst < 1 << 31 for rate, burst in device.rates.limits(LIMITS).values())


def test_what_is_new_raises_nothing(device):
    device.live(3 * BUCKET_S, sent=1000)
    device.live(BUCKET_S - SPAN_S, sent=9_000_000, opens=500)  # an attack of ten minutes before the alarm
    assert device.rates.limits(LIMITS) == LIMITS


def test_a_response_is_not_usual_and_a_day_is_remembered(device):
    device.live(2 * BUCKET_S, sent=1_000_000)
    device.rates.pause()
    device.now_ms += 60_000
    device.sent += 10**12  # while it was in force
    device.live(2 * BUCKET_S, sent=1000)
    assert device.rates.limits(LIMITS)["bytes_out"][0] == 1_500_000
    device.live((MAX_BUCKETS + 1) * BUCKET_S, sent=1000, step_s=2 * SPAN_S)
    assert device.rates.limits(LIMITS) == LIMITS
    assert len(device.rates._buckets) <= MAX_BUCKETS


def test_a_suspension_and_counters_that_begin_anew_count_for_nothing(device):
    device.live(SPAN_S * 3, sent=1000)
    device.live(36_000, sent=1_000_000, step_s=3600)
    device.sent = 0
    device.live(3 * BUCKET_S, sent=1000)
    assert device.rates.limits(LIMITS) == LIMITS


@pytest.mark.parametrize("text", ["", "Tcp: a\nTcp: b\n", "Tcp: ActiveOpens\n", "Udp: 1\n" * 50, "\xff\x00"])
def test_files_that_make_no_sense_leave_the_least(device, text):
    device.write = lambda: (device.folder / "net/snmp").write_text(text)  # type: ignore[method-assign]
    device.live(3 * BUCKET_S, sent=1_000_000)
    assert device.rates.limits(LIMITS) == LIMITS


def test_it_reads_this_machine():
    assert [type(count) for count in UsualRates()._read() or []] == [int] * len(NAMES)
