"""One cgroup, and chosen disks, in place of the whole machine."""

import os
import signal
import time
from pathlib import Path

import netns
import pytest
from stonechat.errors import CollectorError
from stonechat.linux import channels, config
from stonechat.linux import collector as room
from stonechat.linux.cgroup import CgroupDisk, CgroupMemory, processes
from stonechat.linux.collector import LinuxCollector
from stonechat.linux.disks import Disks
from stonechat.linux.schemas import LINUX_1
from stonechat.model import load_model
from stonechat_tools.device import doctor
from stonechat_tools.lab import box

COLUMNS = [name for name, _, _ in LINUX_1.columns]
HOLDS = "import sys; held = bytearray(int(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
MIB = 1 << 20
MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture
def group():
    if os.geteuid():
        pytest.skip("needs root: a cgroup")
    with netns.cgroup() as path:
        yield path


def _held(n_bytes: int, group: str):
    process = netns.start(HOLDS, str(n_bytes), group=group)
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.mark.root
def test_memory_is_what_the_processes_of_the_folder_and_below_it_take(group):
    below = Path(group, "below")
    below.mkdir()
    memory = CgroupMemory(group)
    assert memory.source == "/proc/PID/statm" and memory.used_bytes() == 0 and memory.read() == 25600
    first, second = _held(64 * MIB, group), _held(32 * MIB, str(below))
    try:
        assert sorted(processes(group)) == sorted(str(process.pid) for process in (first, second))
        assert 96 * MIB <= memory.used_bytes() <= 130 * MIB
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert memory.read() == pytest.approx(25600 - 25600 * memory.used_bytes() / total, abs=1)
    finally:
        for process in (first, second):
            process.communicate()
        below.rmdir()
    assert memory.used_bytes() == 0


def test_memory_and_disk_come_from_the_controllers_where_they_are_on(tmp_path):
    (tmp_path / "memory.stat").write_text("anon 5242880\nfile 90000000\nkernel 100\n")
    memory = CgroupMemory(str(tmp_path))
    assert (memory.source, memory.used_bytes()) == ("memory.stat", 5 * MIB)
    memory.close()
    text = "8:0 rbytes=1 wbytes={} rios=1 wios=3 dbytes=0 dios=0\n179:0 rbytes=0 wbytes=1024 rios=0 wios=1\n"
    (tmp_path / "io.stat").write_text(text.format(4096))
    disk = CgroupDisk(str(tmp_path))
    assert disk.read() == 5
    (tmp_path / "io.stat").write_text(text.format(8192))
    assert disk.read() == 9
    disk.close()


def test_chosen_disks_count_and_one_that_comes_late_or_starts_anew_never_jumps(tmp_path):
    def write(**disks: tuple[int, int]) -> None:
        rows = "".join(f" 179 0 {name} 9 9 {read} 9 9 9 {wrote} 9 0 9 9\n" for name, (read, wrote) in disks.items())
        (tmp_path / "diskstats").write_text(rows)

    def filled() -> list[int]:
        values = [0, 0]
        part.fill(values, 0)
        return values

    write(mmcblk0=(100, 200), sda=(5000, 5000))
    part = Disks(str(tmp_path), ("mmcblk0", "nvme0n1"))
    assert part.note == "counts mmcblk0; not there yet: nvme0n1"
    assert filled() == [0, 0]
    write(mmcblk0=(120, 240), sda=(9000, 9000), nvme0n1=(7000, 7000))
    assert filled() == [10, 20]
    write(mmcblk0=(120, 240), nvme0n1=(7002, 7004))
    assert filled() == [11, 22]
    write(mmcblk0=(0, 0), nvme0n1=(7002, 7004))
    assert filled() == [11, 22]
    part.close()


def _columns(collector: LinuxCollector) -> dict[str, int]:
    values = [0] * len(LINUX_1)
    collector.read(values)
    return dict(zip(COLUMNS, values, strict=True))


@pytest.mark.root
def test_the_laboratorys_cgroup_goes_with_whoever_is_left_in_it():
    with box.cgroup() as folder:
        process = netns.start("import time; print('here', flush=True); time.sleep(60)", group=str(folder))
        assert process.stdout.readline() == b"here\n"
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL and not folder.exists()


@pytest.mark.root
def test_a_disk_that_finds_no_folder_leaves_nothing_behind(monkeypatch):
    def refuse(**_):
        raise OSError("no folder")

    monkeypatch.setattr(box.tempfile, "mkdtemp", refuse)
    with pytest.raises(OSError, match="no folder"), box.disk(8):
        pass
    assert not _looped()


def _looped() -> set[str]:
    """Files of this process's own boxes that a loop device holds."""
    held = {path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")}
    return {name for name in held if f"stonechat-{os.getpid()}-" in name}


@pytest.mark.root
def test_the_collector_sees_its_cgroup_and_its_disk_and_nothing_beside_them(group, tmp_path):
    with box.disk(32) as (name, folder):
        collector = LinuxCollector(use_bpf=True, cgroup=group, disks=(name,))
        try:
            before = _columns(collector)
            _write(tmp_path / "beside", 8)
            beside = _columns(collector)
            assert beside["disk_written"] == before["disk_written"] and beside["mem_avail"] == 25600
            process = _held(96 * MIB, group)
            _write(Path(folder, "inside"), 8)
            inside = _columns(collector)
            process.communicate()
        finally:
            collector.close()
        assert inside["disk_written"] - beside["disk_written"] >= 8 << 10
        assert inside["mem_avail"] < 25600 and inside["sys_rate"] > beside["sys_rate"]
    assert ("cgroup", "v2") in [row[:2] for row in collector.sources]
    assert not os.path.exists(folder)
    for _ in range(50):  # the loop device goes when the last writer has let go
        if not Path(f"/sys/block/{name}/loop/backing_file").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"{name} is still there")


def _write(path: Path, mib: int) -> None:
    with path.open("wb") as file:
        file.write(os.urandom(mib * MIB))
        file.flush()
        os.fsync(file.fileno())


def test_a_cgroup_is_never_replaced_by_the_whole_machine(monkeypatch):
    with pytest.raises(CollectorError, match="needs BPF"):
        LinuxCollector(use_bpf=False, cgroup="/sys/fs/cgroup")
    rows = [("syscalls", "", "raw tracepoint does not start")]
    monkeypatch.setattr(room, "start_bpf", lambda *_: ([], rows))
    with pytest.raises(CollectorError, match="does not start"):
        LinuxCollector(use_bpf="auto", cgroup="/sys/fs/cgroup")


@pytest.mark.root
def test_the_doctor_looks_at_the_cgroup(group, monkeypatch):
    monkeypatch.setattr(doctor, "start_bpf", lambda interfaces, cgroup: ([], []))
    (row,) = doctor.bpf_groups(None, group)
    assert row.works and "cpu.stat" in row.note
    assert "name its disks" in row.fix and "ProtectProc=default" in row.fix
    (row,) = doctor.bpf_groups(None, group, ("mmcblk0",))
    assert row.works and "name its disks" not in row.fix
    (row,) = doctor.bpf_groups(None, group + "/nowhere")
    assert not row.works and "No such file" in row.note and "cgroup v2" in row.fix


@pytest.mark.root
def test_the_daemon_watches_what_its_configuration_says(group):
    raw = {"device": {"id": "d", "key_file": "k"}, "model": {"file": "m"}, "mqtt": {"host": "h"}}
    with box.disk(32) as (name, _):
        chosen = config.check(raw | {"collector": {"cgroup": group, "disks": [name]}})
        model = load_model((MODELS / "linux-1/model.tflite").read_bytes())
        collector = channels.open_collector(chosen, model, bytes(32), None)
        collector.close()
    notes = {part: note for part, _, note in collector.sources}
    assert notes["disks"] == "counts " + name
    assert group in notes["cgroup"] and group in notes["connections"]


def test_a_file_is_opened_before_privileges_are_dropped(tmp_path, monkeypatch):
    """Without this the agent, by then an ordinary user, read a processor share of 0 from a folder that is root's."""
    from stonechat.linux import cgroup

    (tmp_path / "cpu.stat").write_text("usage_usec 5\n")
    file = cgroup.CgroupFile(str(tmp_path / "cpu.stat"))

    def refuse(_path):
        raise PermissionError

    monkeypatch.setattr(cgroup, "ProcFile", refuse)
    try:
        assert bytes(file.read()).startswith(b"usage_usec 5")
    finally:
        file.close()
