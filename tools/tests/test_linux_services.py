"""Every service its own channel: counters per cgroup in the kernel, services that come, restart and go, names."""

import math
import os

import netns
import pytest
from stonechat.errors import CollectorError, ConfigError
from stonechat.linux import services
from stonechat.linux.collector import LinuxCollector
from stonechat.linux.schemas import LINUX_SERVICE_1

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
