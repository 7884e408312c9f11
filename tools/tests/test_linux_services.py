"""Every service its own channel: counters per cgroup in the kernel, services that come, restart and go, names."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import netns
import pytest
from stonechat.agent import Agent
from stonechat.delivery import Delivery
from stonechat.errors import CollectorError, ConfigError
from stonechat.fusion import SideChannel
from stonechat.lasting_peers import LastingPeers
from stonechat.linux import bpf, services, syscalls
from stonechat.linux.collector import LinuxCollector
from stonechat.linux.schemas import LINUX_SERVICE_1
from stonechat.linux.sent_to_peers import SentToPeers
from stonechat.model import open_model
from stonechat.outbox_memory import MemoryOutbox
from stonechat.state import State
from stonechat_tools.fleet import history, overview, wire
from stonechat_tools.fleet.keyring import DeviceKeys
from stonechat_tools.fleet.store import Store
from stonechat_tools.traces.files import read_trace
from stonechat_tools.traces.format import BENIGN

MODELS = Path(__file__).parents[2] / "models"
RECORDED = Path(__file__).parent / "services"

COLUMNS = [name for name, _, _ in LINUX_SERVICE_1.columns]
CALLS = "import os\nfor _ in range(5000): os.getppid()"
SENDS = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    for _ in range(10):
        sock.sendto(bytes(100), ("{host}", 9))
for _ in range(7):
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex(("{host}", 9))
"""


@pytest.fixture
def groups():
    """Eight cgroups -> their folders."""
    if os.geteuid():
        pytest.skip("needs root: cgroups")
    with netns.cgroup() as parent:
        folders = [f"{parent}/svc{n}.service" for n in range(7)]
        folders.append(f"{parent}/slice/deep/svc7.service")  # at another depth
        for folder in folders:
            os.makedirs(folder)
        yield folders
        for folder in (*folders, f"{parent}/slice/deep", f"{parent}/slice"):
            if os.path.isdir(folder):
                os.rmdir(folder)


class Watch:
    """What each service has counted since the last look."""

    def __init__(self, names: list[str]) -> None:
        self.collector = LinuxCollector(use_bpf=True, services=names)
        self._values = [0] * len(self.collector.schema)
        self._last = [[0] * len(COLUMNS) for _ in names]
        self.look()

    def look(self) -> list[dict[str, int]]:
        self.collector.read(self._values)
        rows = []
        for each, last in zip(self.collector.services, self._last, strict=True):
            now = [0] * len(COLUMNS)
            each.read(now)
            rows.append(dict(zip(COLUMNS, [a - b for a, b in zip(now, last, strict=True)], strict=True)))
            last[:] = now
        return rows


def run(code: str, folder: str) -> None:
    process = netns.start(code, group=folder)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


@pytest.mark.root
def test_each_service_counts_by_itself_at_any_depth(groups):
    watch = Watch(groups)
    try:
        for busy in (2, 7):
            run(CALLS, groups[busy])
            rows = watch.look()
            for n, row in enumerate(rows):
                if n == busy:
                    assert 5000 <= row["sys_info"] < 5100 and row["execs"] == 1 and row["cpu_time"] > 0
                else:
                    assert not any(row.values()), (n, row)
        assert not any(any(row.values()) for row in watch.look())
    finally:
        watch.collector.close()


@pytest.mark.root
def test_connections_and_bytes_are_those_of_the_service(groups):
    watch = Watch(groups)
    try:
        run(SENDS.format(host="192.0.2.7"), groups[4])
        rows = watch.look()
        # 10 datagrams of 128 bytes and 7 SYNs; how long a SYN is depends on the kernel's options
        if not rows[4]["bytes_out"]:
            pytest.skip("no route to 192.0.2.7 here")
        assert rows[4]["syn_out"] >= 7 and 10 * 128 + 7 * 40 <= rows[4]["bytes_out"] <= 10 * 128 + 30 * 80
        assert not any(row["bytes_out"] or row["syn_out"] for n, row in enumerate(rows) if n != 4)
    finally:
        watch.collector.close()


@pytest.mark.root
def test_a_service_that_comes_restarts_and_goes(groups):
    name = groups[3]
    os.rmdir(name)
    watch = Watch(groups)
    service = watch.collector.services[3]
    try:
        assert service.missing and service.absent and watch.collector.lacks == "service svc3.service"
        os.mkdir(name)
        watch.look()
        assert not service.missing and service.absent  # the window in which it came is not a whole one
        run(CALLS, name)
        assert watch.look()[3]["sys_info"] >= 5000 and not service.absent and watch.collector.lacks == ""
        for _ in range(3):
            os.rmdir(name)
            os.mkdir(name)  # between two windows: another id, and nobody has seen it gone
            watch.look()
            assert service.absent and not service.missing
            run(CALLS, name)
            row = watch.look()[3]
            assert not service.absent and 5000 <= row["sys_info"] < 5100 and 0 < row["cpu_time"] < 10_000
        os.rmdir(name)
        row = watch.look()[3]
        assert service.missing and service.absent and not any(row.values())
        assert watch.look()[2] == dict.fromkeys(COLUMNS, 0)  # the others go on
    finally:
        watch.collector.close()
        os.makedirs(name, exist_ok=True)


MOVES = """
import os
def work():
    for _ in range(5000): os.getppid()
work()
for folder in {folders}:
    with open(folder + "/cgroup.procs", "w") as procs:
        procs.write("0")
    work()
"""


@pytest.mark.root
def test_a_process_that_moves_counts_where_it_is(groups):
    """It starts no program then, and may be the only one on its CPU: nothing but the move shows it."""
    watch = Watch(groups)
    try:
        for _ in range(3):
            run(MOVES.format(folders=[groups[1], groups[7], groups[5]]), groups[0])
            rows = watch.look()
            for n, row in enumerate(rows):
                assert 5000 <= row["sys_info"] < 5100 if n in (0, 1, 5, 7) else not any(row.values()), (n, row)
    finally:
        watch.collector.close()


@pytest.mark.root
def test_threads_of_one_process_count_where_each_is(groups):
    parent = groups[6]
    inner = [f"{parent}/a", f"{parent}/b"]
    for folder in inner:
        os.mkdir(folder)
        Path(folder, "cgroup.type").write_text("threaded")
    threads = """
import os, threading
def work(folder):
    with open(folder + "/cgroup.threads", "w") as file: file.write(str(threading.get_native_id()))
    for _ in range(3000): os.getppid()
both = [threading.Thread(target=work, args=(folder,)) for folder in %r]
for thread in both: thread.start()
for thread in both: thread.join()
"""
    watch = Watch(inner)
    try:
        run(threads % inner, parent)
        assert all(3000 <= row["sys_info"] < 3100 for row in watch.look())
    finally:
        watch.collector.close()
        for folder in inner:
            os.rmdir(folder)


@pytest.mark.root
def test_where_the_kernel_shows_no_moves_each_call_asks(groups, monkeypatch):
    link = syscalls.Syscalls._link

    def refuse(self, program_fd, tracepoint):
        if tracepoint == "cgroup_attach_task":
            os.close(program_fd)
            raise FileNotFoundError(2, "no such tracepoint")
        link(self, program_fd, tracepoint)

    monkeypatch.setattr(syscalls.Syscalls, "_link", refuse)
    watch = Watch(groups)
    try:
        run(MOVES.format(folders=[groups[1]]), groups[0])
        assert all((row["sys_info"] >= 5000) == (n < 2) for n, row in enumerate(watch.look()))
    finally:
        watch.collector.close()


@pytest.mark.root
def test_the_inner_of_two_services_counts(groups):
    parent = os.path.dirname(groups[7])
    watch = Watch([parent, groups[7]])
    try:
        run(CALLS, groups[7])
        outer, inner = watch.look()
        assert inner["sys_info"] >= 5000 and not any(outer[name] for name in COLUMNS if name != "cpu_time")
        run(CALLS, parent)
        outer, inner = watch.look()
        assert outer["sys_info"] >= 5000 and not any(inner.values())
    finally:
        watch.collector.close()


def test_a_unit_is_found_where_it_runs_or_expected_where_systemd_puts_it(tmp_path):
    root = str(tmp_path)
    usual = {
        "nginx.service": "system.slice/nginx.service",
        "getty@tty1.service": "system.slice/system-getty.slice/getty@tty1.service",
        "my-app@1.service": "system.slice/system-my\\x2dapp.slice/my-app@1.service",
        "a-b-c.slice": "a.slice/a-b.slice/a-b-c.slice",
        "/system.slice/docker-abc.scope": "system.slice/docker-abc.scope",
        "system.slice/x.service/": "system.slice/x.service",
        f"{root}/docker/abc": "docker/abc",
    }
    for name, folder in usual.items():
        assert services.service_path(name, root) == f"{root}/{folder}"
    os.makedirs(tmp_path / "machine.slice/payload/nginx.service")
    assert services.service_path("nginx.service", root) == f"{root}/machine.slice/payload/nginx.service"


@pytest.mark.parametrize(
    "name", ["nginx", "../x.service", "/../../etc", "a/../../b", "/", "x/..", "/sys/elsewhere/x.service"]
)
def test_what_is_no_service_is_one_clear_line(name, tmp_path):
    with pytest.raises(ConfigError, match=r"^\[collector\] services: \S+ (is no unit|does not lie below)"):
        services.service_path(name, str(tmp_path))


def test_too_many_and_twice_the_same_are_refused():
    names = [f"s{n}.service" for n in range(9)]
    with pytest.raises(ConfigError, match="9 of them, at most 8"):
        services.check_services(names, [f"/x/{name}" for name in names])
    for pair in (["a.service", "/system.slice/a.service"], ["/x/a.service", "/y/a.service"]):
        with pytest.raises(ConfigError, match="are the same"):
            services.check_services(pair, ["/r/" + pair[0], "/r/" + pair[1]])


@pytest.mark.parametrize("name", [LastingPeers.name, SentToPeers.name, history.OWN_MODEL, "counters door-lock-1"])
def test_the_name_of_another_channel_is_refused(name):
    with pytest.raises(ConfigError, match="has the name of another channel; rename its folder"):
        services.check_services(["/x/" + name], ["/r/x/" + name])


def test_services_need_bpf():
    with pytest.raises(CollectorError, match="services needs BPF"):
        LinuxCollector(use_bpf=False, services=["a.service"])


def test_the_budget_is_shared_by_the_threshold():
    rules = ((256, 384, 3200), (256, 512, 5120))
    assert services.share_budget(rules, 1) == list(rules)
    for n in range(2, 9):
        for (_, _, before), (_, _, after) in zip(rules, services.share_budget(rules, n), strict=True):
            assert (after - before) / 256 == pytest.approx(1.16 * math.log10(n), abs=0.02)


def test_names_fit_into_a_status():
    assert services.channel_name("/system.slice/nginx.service") == "nginx.service"
    assert services.channel_name("docker-" + "f" * 64 + ".scope") == "docker-" + "f" * 17
    assert len(services.channel_name("é" * 40 + ".service").encode()) <= services.MAX_NAME_BYTES


def test_the_words_of_the_kernel_are_the_columns():
    """The collector copies them as they lie."""
    assert COLUMNS[16:18] == ["execs", "forks"] and services._CALLS == 18
    names = {"syn_out": "SYN_OUT", "accepted": "ACCEPTED", "rst_in": "RST_IN"}
    names |= {"bytes_out": "BYTES_OUT", "bytes_in": "BYTES_IN"}
    assert [getattr(services, names[column]) for column in COLUMNS[18:23]] == list(range(5))


@pytest.mark.root
def test_a_kernel_that_gives_no_ancestor_counts_what_is_in_the_cgroup_itself(groups, monkeypatch):
    """Linux before 5.15 refuses the helper to tracepoints."""
    load = syscalls.Syscalls._load

    def refuse(self, program, name):
        if name != "stonechat_moved" and self._cgroup_helper == bpf.CURRENT_ANCESTOR_CGROUP_ID:
            raise CollectorError("the verifier refused: unknown func bpf_get_current_ancestor_cgroup_id#123")
        return load(self, program, name)

    monkeypatch.setattr(syscalls.Syscalls, "_load", refuse)
    watch = Watch(groups)
    try:
        assert "before 5.15" in next(note for group, _, note in watch.collector.sources if group == "syscalls")
        for busy in (0, 7):
            run(CALLS, groups[busy])
            rows = watch.look()
            assert rows[busy]["sys_info"] >= 5000
            assert not any(any(row.values()) for n, row in enumerate(rows) if n != busy)
    finally:
        watch.collector.close()


# --- from the kernel's counters to the operator's table ---------------------------------------------------------------


class Played:
    """A collector that plays a trace's windows."""

    sources = ()
    schema = LINUX_SERVICE_1

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = iter(rows)
        self._sums = [0] * len(COLUMNS)
        self.absent = False

    def read(self, values: list[int]) -> None:
        row = next(self._rows)
        self._sums = [a + b for a, b in zip(self._sums, row, strict=True)]
        values[:] = self._sums

    def close(self) -> None:
        pass


def played(name: str, attacked: int = 0) -> tuple[list[list[int]], int]:
    """The windows of a recording in tools/tests/services -> (a row to prime with and those before the attack, with
    `attacked` windows of it behind them; how many are before)."""
    trace = read_trace(RECORDED / f"{name}.csv.gz")
    rows = trace.deltas.tolist()
    before = next((n for n, label in enumerate(trace.labels) if label != BENIGN), len(rows))
    return [[0] * len(COLUMNS), *rows[: before + attacked]], before


def test_an_attack_in_a_service_is_named_at_the_collector(monkeypatch, tmp_path, capsys):
    """The real agent, its reporter, the wire, the store and `stonechat report`; windows as they were recorded."""
    model = open_model(str(MODELS / "linux-service-1/model.tflite"))
    model.metadata.alarm_rules = services.share_budget(model.metadata.alarm_rules, 8)
    quiet, n = played("store")
    loud, _ = played("store", attacked=8)
    calm = Played(quiet + quiet[1:9])
    extra = [(Played(quiet + quiet[1:9]), model, "quiet.service"), (Played(loud), model, "store.service")]
    secret = bytes(range(32))
    heard: list[tuple[str, bytes]] = []
    reporter = Delivery("pump-1", secret, MemoryOutbox(32768), prefix="stonechat/1/fleet/")
    state = State(None)
    agent = Agent(calm, model, reporter=reporter, state=state, extra=extra, publish=lambda *_: None)
    verdicts = []

    def publish(topic, payload, qos, retain):
        heard.append((topic, bytes(payload)))

    agent.publish = publish
    for window in range(n + 9):
        verdict = agent.end_window(window * 5000)
        if verdict is not None:
            verdicts.append(verdict.level)
        if window == n // 2:
            agent.save()
        reporter.pump(publish, window * 5000)
    publish(reporter.status_topic, agent.status(), 1, True)
    assert max(verdicts[:n]) == 0 and 2 in verdicts[n:]
    assert {section[-8:] for section in state.sections if len(section) > 8} == {c.id for c in agent.channels[1:]} | {
        LINUX_SERVICE_1.id
    }
    keys = DeviceKeys(secret, "pump-1")
    path = str(tmp_path / "fleet.db")
    with Store(path) as store:
        reports = [wire.open_report("pump-1", keys, message) for topic, message in heard if topic.endswith("/report")]
        statuses = [wire.open_status("pump-1", keys, message) for topic, message in heard if topic.endswith("/status")]
        assert statuses[-1].channels == ("quiet.service", "store.service")
        store.put(reports, statuses)
        alarm = next(report for report in reports if report.level == 2)
        assert alarm.channel == 2
        assert str(overview.in_channel(store, store.devices()[0])) == " in store.service"
    parser = argparse.ArgumentParser()
    history.add_arguments(parser)
    assert history.run(parser.parse_args(["pump-1", "--db", path, "--json"])) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    row = next(row for row in rows if row["level"] == "alarm")
    assert row["channel"] == "store.service"
    assert {feature["name"] for feature in row["features"]} <= set(COLUMNS)
    monkeypatch.setenv("COLUMNS", "200")
    assert history.run(parser.parse_args(["pump-1", "--db", path])) == 0
    assert "store.service" in " ".join(capsys.readouterr().out.split())


def test_a_service_that_is_gone_lets_the_evidence_ebb_and_learns_nothing():
    model = open_model(str(MODELS / "linux-service-1/model.tflite"))
    loud, n = played("store", attacked=8)
    collector = Played(loud + [loud[-1]] * 40)
    channel = SideChannel(collector, model, State(None), "store.service")
    for window in range(n + 9):
        verdict = channel.end_window(window * 5000)
    assert verdict is not None and verdict.level == 2
    collector.absent = True
    seen = channel.scorer.seen
    levels = [channel.end_window((n + 9 + window) * 5000).level for window in range(20)]
    assert levels[-1] == 0 and levels == sorted(levels, reverse=True) and channel.scorer.seen == seen
    collector.absent = False
    assert channel.end_window((n + 29) * 5000) is None  # the first reading after it came back only primes
    assert channel.end_window((n + 30) * 5000) is not None
    fresh = SideChannel(Played(loud), model, State(None), "other.service")
    fresh.collector.absent = True
    assert [fresh.end_window(window * 5000) for window in range(5)] == [None] * 5 and fresh.scorer.seen == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('services = ["nginx"]', "nginx is no unit like"),
        ('services = ["a.service", "/system.slice/a.service"]', "are the same"),
        ('services = ["a.service"]\nbpf = false', "services needs BPF"),
        ('services = ["a.service"]\nservice_model = "/nowhere/model.tflite"', "[collector] service_model"),
    ],
)
@pytest.mark.root
def test_a_wrong_configuration_is_one_clear_line(line, words, tmp_path):
    if os.geteuid():
        pytest.skip("needs root: BPF")
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("00" * 32)
    text = f'[device]\nid = "x"\nkey_file = "{key}"\nstate_file = "{tmp_path}/state"\n[model]\nfile = "linux-1"\n'
    path = tmp_path / "stonechat.toml"
    path.write_text(text + f'[collector]\n{line}\n[mqtt]\nhost = "127.0.0.1"\ntls = false\n')
    command = [sys.executable, "-m", "stonechat.linux.cli", "--config", str(path), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
