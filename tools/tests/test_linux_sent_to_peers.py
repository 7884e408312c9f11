"""The channel of what is sent to each of the device's own hosts: what it finds, what it leaves alone, its bounds."""

import netns
import pytest
from stonechat.agent import Agent
from stonechat.delivery import Delivery
from stonechat.detection import ALARM, NORMAL
from stonechat.linux import channels
from stonechat.linux.collector import LinuxCollector
from stonechat.linux.respond import NETWORK, family_of
from stonechat.linux.schemas import LINUX_1
from stonechat.linux.sent_to_peers import SentToPeers
from stonechat.model import open_model
from stonechat.outbox_memory import MemoryOutbox
from stonechat.state import State
from stonechat_tools.fleet import history, wire
from stonechat_tools.fleet.keyring import DeviceKeys
from stonechat_tools.fleet.store import Store

OWN, OTHER = 11, 12
MODEL = "models/linux-1/model.tflite"


class Collector:
    contacts: tuple[int, ...] = ()
    sent: tuple[int, ...] = ()


class Device:
    """A channel, and windows of what is sent to whom."""

    def __init__(self, learn=60, most=256, window_ms=5000, state=None):
        self.collector = Collector()
        self.channel = SentToPeers(self.collector, window_ms, learn, most).open(state)
        self.now_ms = 0

    def windows(self, sent, number=1, elapsed_ms=None):
        """-> the verdict after N windows like this: {host: bytes}."""
        for _ in range(number):
            self.now_ms += elapsed_ms or self.channel._window_ms
            self.collector.contacts, self.collector.sent = tuple(sent), tuple(sent.values())
            verdict = self.channel.end_window(self.now_ms)
        return verdict

    def until_alarm(self, sent, most=40):
        for n in range(1, most + 1):
            if self.windows(sent).level == ALARM:
                return n
        return None


def usual(**options):
    """A device that has learned 5,000 bytes a window to its own host."""
    device = Device(**options)
    device.windows({OWN: 5000}, 60)
    return device


def test_two_kilobytes_a_second_to_a_known_host_are_found_within_six_windows():
    for to_host in (0, 300, 5000, 9000):
        device = Device()
        device.windows({OWN: to_host, OTHER: 90}, 60)
        assert device.windows({OWN: to_host}, 100).level == NORMAL
        found = device.until_alarm({OWN: to_host + 10_400})
        assert found is not None and 3 <= found <= 6, (to_host, found)
        assert device.channel.verdict.explain(1)[0][0] == 0 and device.channel.verdict.evidence_q8 >= 256


def test_bursts_and_long_windows_are_no_alarm():
    device = usual()
    for _ in range(20):
        device.windows({OWN: 10_000_000})  # one window of an upload
        assert device.windows({OWN: 5000}, 30).level == NORMAL
    for _ in range(20):  # an agent that was late: one window has what three send
        device.windows({OWN: 15_000}, 1, elapsed_ms=15_000)
    assert device.channel.verdict.evidence_q8 == 0
    assert device.windows({OWN: 25_000}, 40, elapsed_ms=25_000).level == NORMAL


def test_what_comes_every_other_window_is_found_too():
    device = usual()
    for _ in range(20):
        device.windows({OWN: 25_000})
        if device.windows({}).level == ALARM:
            break
    assert device.channel.verdict.level == ALARM


def test_a_host_met_a_few_times_is_measured_by_the_others():
    device = Device()
    device.windows({OWN: 50_000}, 50)
    device.windows({OWN: 50_000, OTHER: 10}, 10)
    assert device.windows({OTHER: 45_000}, 40).level == NORMAL
    assert device.until_alarm({OTHER: 100_000}) is not None


def test_strangers_and_what_is_held_teach_nothing():
    device = usual()
    assert device.windows({99: 1_000_000}, 50).level == NORMAL and 99 not in device.channel._own
    device = Device()
    device.windows({OWN: 5000}, 30)
    device.channel.hold_peers(True)
    device.windows({OWN: 50_000, OTHER: 1}, 30)
    device.channel.hold_peers(False)
    assert OTHER not in device.channel._own
    device.windows({OWN: 5000}, 40)
    assert device.until_alarm({OWN: 50_000}) is not None


def test_an_operators_answers():
    device = usual()
    assert device.until_alarm({OWN: 30_000})
    device.channel.clear_evidence()
    assert device.channel.verdict.level == NORMAL
    assert device.windows({OWN: 30_000}, 200).level == NORMAL
    assert device.until_alarm({OWN: 80_000})
    device.channel.recalibrate()
    assert device.windows({OWN: 80_000}, 200).level == NORMAL
    assert device.until_alarm({OWN: 200_000})


def test_an_alarm_of_an_hour_is_steady_and_something_new_on_top_is_found():
    device = usual()
    assert device.until_alarm({OWN: 30_000})
    before = device.channel._stated
    verdict = device.windows({OWN: 30_000}, before + 1)
    assert verdict.level == NORMAL and verdict.steady and device.channel.steady
    assert device.windows({OWN: 30_000}, 5 * before).level == NORMAL and device.channel.steady
    assert device.channel.age > 5 * before
    state = State()
    device.channel.save(state)
    again = Device(state=state)  # a restart forgets neither
    assert again.channel.steady and again.windows({OWN: 30_000}, 100).level == NORMAL
    assert 3 <= (again.until_alarm({OWN: 60_000}) or 99) <= 6
    again.channel.clear_evidence()
    assert not again.channel.steady
    # by itself, where it is as before for as long; then the old limit holds again
    assert device.windows({OWN: 5000}, before + 40).level == NORMAL and not device.channel.steady
    assert device.until_alarm({OWN: 30_000})


def test_its_memory_is_bounded_and_kept():
    device = Device(learn=1000, most=16)
    for peer in range(500):
        device.windows({peer: 1000 + peer, OWN: 5000})
    assert len(device.channel._own) == 16 and OWN in device.channel._own
    assert device.channel._active <= device.channel._own.keys()
    state = State()
    device.channel.save(state)
    assert len(state.get(device.channel._section)) == 4 + 16 * 16
    again = Device(learn=1000, most=16, state=state)
    for peer, entry in device.channel._own.items():
        assert again.channel._own[peer][1:3] == entry[1:3]
    for damaged in (b"x", bytes(8), bytes(4 + 16 * 17), bytes(3)):
        state.put(device.channel._section, damaged)
        assert not Device(most=16, state=state).channel._own
    huge = Device(learn=1)
    huge.windows({OWN: 1 << 60})
    huge.channel.save(state)
    assert Device(state=state).channel._own[OWN][1] == 0xFFFFFFFF


def test_the_response_takes_it_for_the_network():
    assert family_of(SentToPeers.schema.columns[0][0]) == NETWORK


class Replayed(Collector):
    schema = LINUX_1
    sources = (("connections", "replay", ""),)
    most_peers = 256

    def read(self, values):
        values[:] = [0] * len(values)

    def hold_peers(self, hold):
        pass

    def dump(self):
        return b""

    def restore(self, packed):
        pass

    def close(self):
        pass


def test_the_operator_reads_its_name(tmp_path):
    """The daemon's own channels, the real agent, its reporter, the wire, the store, and the names of its features."""
    collector = Replayed()
    model = open_model(MODEL)
    config = {
        "collector": {"services": [], "learn_peers_hours": 1},
        "counters": {"list": []},
    }
    extra = channels.open_channels(config, model, collector)
    secret = bytes(range(32))
    reporter = Delivery("pump-1", secret, MemoryOutbox(32768), prefix="stonechat/1/fleet/")
    heard = []

    def publish(topic, payload, qos, retain):
        heard.append((topic, bytes(payload)))

    agent = Agent(collector, model, reporter=reporter, state=State(), extra=extra, publish=publish, learn_peers_hours=0)
    assert agent.channel_names == ["lasting peers", "sent to peers"]
    for window in range(3600 // 5 + 30):
        collector.contacts, collector.sent = (OWN,), (5000 if window < 730 else 20_000,)
        verdict = agent.end_window(window * 5000)
        reporter.pump(publish, window * 5000)
    assert verdict.level == ALARM and agent.columns == ["sent_to_peer"]
    publish(reporter.status_topic, agent.status(), 1, True)
    keys = DeviceKeys(secret, "pump-1")
    reports = [wire.open_report("pump-1", keys, message) for topic, message in heard if topic.endswith("/report")]
    statuses = [wire.open_status("pump-1", keys, message) for topic, message in heard if topic.endswith("/status")]
    with Store(str(tmp_path / "fleet.db")) as store:
        store.put(reports, statuses)
        device = store.devices()[0]
        row = next(row for row in store.history("pump-1") if row.level == ALARM)
        shown = history.as_json(row, device)
    assert shown["channel"] == "sent to peers" and shown["features"][0]["name"] == "sent_to_peer"


SENDER = """
import socket, sys
sockets = {}
for line in sys.stdin:
    host, size, number = line.split()
    sock = sockets.setdefault(host, socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    for _ in range(int(number)):
        sock.sendto(bytes(int(size)), (host, 9))
    print("sent", flush=True)
"""


@pytest.mark.root
@netns.needs_root
def test_the_kernels_counters_of_each_host():
    """Datagrams of a process in a namespace and cgroup of its own, counted by BPF."""
    with netns.network() as net, netns.cgroup() as group:
        collector = LinuxCollector(peers_secret=bytes(32), use_bpf=True, cgroup=group)
        process = netns.start(SENDER, net=net, group=group)
        channel = SentToPeers(collector, 1000, 20).open(None)
        values = [0] * len(collector.schema)

        def window(n, **hosts):
            for host, number in hosts.items():
                process.stdin.write(f"10.77.0.{host[1:]} 472 {number}\n".encode())
                process.stdin.flush()
                assert process.stdout.readline() == b"sent\n"
            collector.read(values)
            return channel.end_window(n * 1000)

        try:
            for n in range(30):
                assert window(n, h7=4, h8=1).level == NORMAL
            assert sorted(collector.sent) == [500, 2000]  # with the headers of IP and UDP
            found = next(n for n in range(1, 10) if window(30 + n, h7=4, h8=9).level == ALARM)
            assert 3 <= found <= 6
        finally:
            process.communicate(timeout=30)
            collector.close()
