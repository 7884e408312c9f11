"""What the daemon goes on through, what it says about it, and what it leaves alone."""

import contextlib
import fcntl
import os
import pty
import resource
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from agent_process import DEVICE, WINDOW_MS, AgentProcess, is_root, open_the_way, quick_model, wait_for
from stonechat.cbor_decode import loads
from stonechat.compat import ticks_ms
from stonechat.cose import Mac
from stonechat.cose_open import unseal
from stonechat.delivery import Delivery
from stonechat.detection import ALARM, Verdict
from stonechat.features import RATE
from stonechat.linux import files
from stonechat.linux.disk_outbox import DiskOutbox
from stonechat.linux.log import Log, Troubles
from stonechat.linux.schemas import LINUX_PROC_1
from stonechat.linux.verdict_log import VerdictLog
from stonechat.schema import Schema
from stonechat_tools.fleet.collect import Collector
from stonechat_tools.fleet.keyring import Keys
from stonechat_tools.fleet.local_broker import LocalBroker
from stonechat_tools.fleet.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    open_the_way(tmp_path)
    quick_model(tmp_path / "model.tflite")
    return tmp_path


def given_to_the_agent(path: Path) -> Path:
    """A folder that the agent's user can write to."""
    path.mkdir(parents=True)
    path.chmod(0o777)
    return path


def listing(folder: Path) -> list[tuple[str, int, int, int]]:
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.append((str(path.relative_to(folder)), status.st_mode, status.st_uid, status.st_size))
    return found


def goes_on(agent: AgentProcess, store: Store, count: int = 5) -> None:
    before = store.count()
    wait_for(lambda: store.count() >= before + count, say=agent.said)
    assert "Traceback" not in agent.said()


def collector_for(agent: AgentProcess, store: Store, port: int) -> Collector:
    return Collector(store, Keys({DEVICE: agent.secret}), host="127.0.0.1", port=port, prefix="stonechat/1/fleet")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2 << 30)


STRANGERS: list[tuple[str, Callable[[Path], object]]] = [
    ("notes.seg", lambda path: path.write_bytes(b"hello")),
    ("-0000001.seg", lambda path: path.write_bytes(b"hello")),
    ("1.seg", lambda path: path.write_bytes(b"hello")),
    ("lost+found.seg", lambda path: path.mkdir()),
    ("00000005.seg", lambda path: path.mkdir()),
    ("00000003.seg", fifo),
    ("00000004.seg", sparse),
    ("00000006.seg", lambda path: path.symlink_to("/dev/zero")),
    ("00000001.seg.tmp", fifo),
    ("ffffffff.seg", lambda path: path.write_bytes(b"")),
    ("0000000A.seg", lambda path: path.write_bytes(b"A")),
]


def test_strangers_in_the_outbox_are_left_alone(folder: Path) -> None:
    outbox = given_to_the_agent(folder / "outbox")
    for name, make in STRANGERS:
        make(outbox / name)
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port)
        with collector_for(agent, store, broker.port), agent:
            goes_on(agent, store)
        assert "outbox" not in agent.said(), agent.said()
    kept = {path.name for path in outbox.iterdir()}
    assert {name for name, _ in STRANGERS if not name.endswith((".tmp", "00000004.seg"))} <= kept


@pytest.mark.parametrize("make", [fifo, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff" * 99)])
def test_a_state_that_is_no_state_costs_what_was_learned_and_no_more(folder: Path, make: object) -> None:
    given_to_the_agent(folder / "state")
    make(folder / "state" / "state")  # type: ignore[operator]
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port)
        with collector_for(agent, store, broker.port), agent:
            goes_on(agent, store)
        assert "starting afresh" in agent.said()


@pytest.mark.parametrize("broken", ["full", "closed", "reader gone", "reader asleep", "not open"])
def test_a_log_that_can_not_be_written_stops_nothing(folder: Path, broken: str) -> None:
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port)
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        before_exec: Callable[[], object] | None = None
        if broken == "full":
            os.close(writer)
            writer = os.open("/dev/full", os.O_WRONLY)
        elif broken == "reader asleep":
            os.write(writer, bytes(4096))
        elif broken == "not open":
            before_exec = lambda: [os.close(fd) for fd in range(3)]  # noqa: E731
        with collector_for(agent, store, broker.port):
            process = subprocess.Popen(
                agent.command, stderr=writer, stdout=writer, stdin=subprocess.DEVNULL, preexec_fn=before_exec
            )
            agent.process = process
            try:
                os.close(writer)
                if broken == "reader gone":
                    os.close(reader)
                    reader = -1
                goes_on(agent, store)
                if broken == "not open":  # no file of the agent has become its standard error
                    assert os.readlink(f"/proc/{process.pid}/fd/2") == os.devnull
                assert agent.stop() == 0
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                if reader >= 0:
                    os.close(reader)


def test_lost_lines_of_the_log_are_counted() -> None:
    reader, writer = os.pipe()
    log = Log("info", writer)
    for _ in range(1000):
        log("info", "a line " + "x" * 100)
    assert log.lost > 0
    lost = log.lost
    os.read(reader, 1 << 20)
    log("info", "readable again\nwith a break\x1b[0m")
    text = os.read(reader, 4096).decode()
    assert f"{lost} lines of this log could not be written" in text
    assert "readable again?with a break?[0m\n" in text
    os.close(reader)
    os.close(writer)


def test_a_cause_is_logged_once_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    troubles = Troubles(lambda level, text: lines.append(text))  # type: ignore[arg-type]
    for _ in range(50):
        troubles.say("broker", "refused")
    troubles.say("broker", "untrusted")
    troubles.say("outbox", "full")
    for _ in range(50):
        troubles.say("broker", "refused")  # again, without having worked meanwhile
        troubles.say("broker", "untrusted")
    assert lines == ["broker: refused", "broker: untrusted", "outbox: full"]
    troubles.recovered("outbox", 0)
    troubles.say("outbox", "full")
    assert lines[3:] == ["outbox: works again", "outbox: full"]
    for number in range(1000):
        troubles.say("other", str(number))
    assert len(troubles._logged) <= 32


def test_counters_that_can_not_be_read_cost_their_own_channel_only(folder: Path) -> None:
    door = folder / "openings"
    door.write_text("7\n")
    quick_model(folder / "door.tflite", Schema("door-1", (("openings", "1", RATE),)))
    more = f"""[counters]
schema = "door-1"
model = "{folder}/door.tflite"
list = [{{name = "openings", unit = "1", kind = "rate", path = "{door}"}}]
"""
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port, more=more)
        with collector_for(agent, store, broker.port), agent:
            goes_on(agent, store)
            for spoil in (door.unlink, lambda: door.write_text("seven"), lambda: door.write_bytes(b"\xff" * 40)):
                spoil()
                goes_on(agent, store)
            door.unlink()
            os.mkfifo(door)
            goes_on(agent, store)
            wait_for(lambda: "sources: lacking counters door-1" in agent.said(), say=agent.said)
            door.unlink()
            door.write_text("9000000\n")
            wait_for(lambda: "sources: works again" in agent.said(), say=agent.said)
            goes_on(agent, store)


def test_an_interface_that_is_not_there_is_named(folder: Path) -> None:
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port)
        text = agent.config.read_text().replace("bpf = false", 'bpf = false\ninterfaces = ["lo", "eht0"]')
        agent.config.write_text(text)
        with collector_for(agent, store, broker.port), agent:
            goes_on(agent, store, 3)
            wait_for(lambda: "lacking interface eht0" in agent.said(), say=agent.said)
        health = (folder / "state" / "state.health").read_text()
        assert "lacks interface eht0" in health and "unscored 0 1 0 0" in health


def test_a_second_instance_ends_with_one_line_and_a_status_of_its_own(folder: Path) -> None:
    with LocalBroker() as broker, AgentProcess(folder, broker.port) as agent:
        wait_for(lambda: "connected" in agent.said(), say=agent.said)
        second = agent.run_to_end()
        assert second.returncode == 75
        assert "another stonechat-agent uses" in second.stderr and len(second.stderr.splitlines()) == 1
        check = subprocess.run([*agent.command, "--check"], capture_output=True, text=True, timeout=30)
        assert check.returncode == 0, check.stderr
        assert agent.process is not None
        agent.process.kill()
        agent.process.wait()
        agent.start()  # the lock goes with the process
        agent.log.write_text("")
        wait_for(lambda: "connected" in agent.said(), say=agent.said)


def test_check_changes_nothing(folder: Path) -> None:
    agent = AgentProcess(folder, 1)
    (folder / "state").mkdir()
    (folder / "state" / "state").write_bytes(b"damaged")
    before = listing(folder)
    done = subprocess.run([*agent.command, "--check"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert listing(folder) == before


@pytest.mark.root
@pytest.mark.skipif(not is_root(), reason="needs root: owners")
def test_what_was_there_keeps_its_owner_and_links_are_not_followed(folder: Path) -> None:
    with LocalBroker() as broker:
        app = folder / "app"
        app.mkdir(mode=0o755)
        agent = AgentProcess(folder, broker.port, state=str(app / "state"))
        with agent:
            wait_for(lambda: "chown 65534" in agent.said(), say=agent.said)
        assert app.stat().st_uid == 0
        # what the agent's own user can plant, for the next start as root
        theirs = folder / "theirs"
        theirs.mkdir()
        os.chown(theirs, 65534, 65534)
        secret = folder / "secret"
        secret.mkdir(mode=0o700)
        (theirs / "outbox").symlink_to(secret)
        agent = AgentProcess(folder, broker.port, outbox_dir=str(theirs / "outbox"), state=str(theirs / "a/b/state"))
        with agent:
            wait_for(lambda: "connected" in agent.said(), say=agent.said)
            time.sleep(3 * WINDOW_MS / 1000)
        assert secret.stat().st_uid == 0 and not list(secret.iterdir())
        assert (theirs / "a" / "b").stat().st_uid == 65534


def test_sighup_reads_keys_again(folder: Path) -> None:
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port)
        if is_root():  # it becomes nobody, who must be able to read the new key, as under the unit's User=
            os.chown(agent.secret_file, 65534, -1)
        with agent:
            with collector_for(agent, store, broker.port):
                goes_on(agent, store, 3)
            assert agent.process is not None
            agent.secret_file.write_text("not a key")
            agent.process.send_signal(signal.SIGHUP)
            wait_for(lambda: "stay in use" in agent.said(), say=agent.said)
            agent.secret_file.write_text(secrets.token_hex(32) + "\n")
            agent.process.send_signal(signal.SIGHUP)
            wait_for(lambda: "read again" in agent.said(), say=agent.said)
            with collector_for(agent, store, broker.port):  # knows the new key only
                goes_on(agent, store, 3)


def test_a_closed_terminal_ends_it(folder: Path) -> None:
    with LocalBroker() as broker:
        agent = AgentProcess(folder, broker.port)
        child, terminal = pty.fork()
        if child == 0:
            os.execv(agent.command[0], agent.command)
        said = b""
        deadline_s = time.monotonic() + 30
        while b"connected" not in said and time.monotonic() < deadline_s:
            said += os.read(terminal, 1000)
        assert b"connected" in said
        os.close(terminal)
        wait_for(lambda: os.waitpid(child, os.WNOHANG)[0] == child, say=lambda: said)


def test_no_descriptor_is_inherited_and_no_core_holds_the_key(folder: Path) -> None:
    with LocalBroker() as broker:
        agent = AgentProcess(folder, broker.port)
        secret = os.open(folder / "secret", os.O_CREAT | os.O_RDWR)
        os.write(secret, b"x")
        with open(agent.log, "ab") as log:
            unlimited = lambda: resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))  # noqa: E731
            agent.process = subprocess.Popen(
                agent.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                pass_fds=[secret],
                preexec_fn=unlimited,
                cwd=folder,
            )
        try:
            wait_for(lambda: "connected" in agent.said(), say=agent.said)
            names = [os.readlink(path) for path in Path(f"/proc/{agent.process.pid}/fd").iterdir()]
            assert str(folder / "secret") not in names
            limits = Path(f"/proc/{agent.process.pid}/limits").read_text()
            core = next(line for line in limits.splitlines() if line.startswith("Max core"))
            assert core.split()[4] in ("0", "1")
            agent.process.send_signal(signal.SIGSEGV)
            agent.process.wait(20)
            assert not [path for path in folder.iterdir() if path.name.startswith("core")]
        finally:
            os.close(secret)
            if agent.process.poll() is None:
                agent.stop()


def group_of(number: int) -> Iterator[str]:
    """The processes of a process group that are still there."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == number and fields[0] != "Z":
                yield path.parent.name


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
@pytest.mark.parametrize(
    "when", ["1970-01-01 00:00:10", "2020-01-01 00:00:00", "2106-02-08 00:00:00", "2200-01-01 00:00:00"]
)
def test_any_clock_will_do(folder: Path, when: str) -> None:
    with LocalBroker() as broker, Store(folder / "fleet.db") as store:
        agent = AgentProcess(folder, broker.port)
        with collector_for(agent, store, broker.port), open(agent.log, "ab") as log:
            command = ["faketime", "-f", "@" + when, *agent.command]
            agent.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                goes_on(agent, store, 4)
            finally:
                os.killpg(agent.process.pid, signal.SIGTERM)  # faketime passes no signal on to its child
                agent.stop()
                wait_for(lambda: not list(group_of(agent.process.pid)), 15)


def test_a_decoy_does_not_hide_the_next_cause_from_the_log() -> None:
    lines: list[str] = []
    names = [name for name, _, _ in LINUX_PROC_1.columns]
    agent = SimpleNamespace(windows=0, columns=names, model_name="quick", channels=[])
    log = VerdictLog(lambda level, text: lines.append(text))
    verdict = Verdict(len(LINUX_PROC_1))

    def window(feature: int, changed: bool = False) -> None:
        agent.windows += 1
        verdict.level, verdict.changed, verdict.surprise_q8 = ALARM, changed, 1000
        verdict.parts = [0] * len(verdict.parts)
        verdict.parts[feature] = 100
        log.observe(verdict, agent)

    window(3, changed=True)
    for _ in range(500):
        window(3)
    assert len(lines) == 1
    window(7)
    for _ in range(30):
        window(3)
        window(7)
    assert len(lines) == 2 and lines[1].startswith("alarm goes on") and LINUX_PROC_1.columns[7][0] in lines[1]


def test_an_alarm_is_not_lost_behind_the_heartbeats_of_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "outbox").write_text("a file where the folder should be")
    outbox = DiskOutbox(str(tmp_path / "outbox"))
    assert "can't write" in outbox.trouble
    delivery = Delivery("d", bytes(32), outbox, bytes_per_day=0, heartbeat_windows=1)
    verdict = Verdict(3)
    for now_ms in range(0, 500_000, 5_000):  # offline
        verdict.level, verdict.changed = (
            (2, now_ms == 250_000) if 250_000 <= now_ms < 300_000 else (0, now_ms == 300_000)
        )
        delivery.observe(verdict, now_ms)
    sent: list[bytes] = []
    delivery.pump(lambda topic, payload, *_: sent.append(bytes(payload)), 500_000)
    levels = [loads(unseal(Mac(bytes(32), b"report", "d"), message))[5] for message in sent]
    assert 2 in levels, levels
    (tmp_path / "outbox").unlink()
    outbox._due_ms = ticks_ms()
    delivery.observe(verdict, 505_000)
    assert outbox.trouble == "" and list((tmp_path / "outbox").glob("*.seg"))
    assert delivery.sequence == 102, "numbers go on"


def test_a_missing_folder_is_to_be_made_and_the_one_above_keeps_its_owner(tmp_path: Path) -> None:
    user = 65534 if is_root() else os.geteuid()
    if is_root():
        os.setresuid(user, user, 0)
    try:
        said = files.make_trouble("/nowhere/outbox", False)
        with tempfile.TemporaryDirectory() as own:
            file = Path(own) / "00000001.seg"
            file.touch(0o000)
            shut = [files.folder_trouble(own)]
            file.unlink()
            Path(own).chmod(0o500)
            shut.append(files.folder_trouble(own))
            Path(own).chmod(0o700)
    finally:
        if is_root() or os.getresuid()[2] == 0:
            os.setresuid(0, 0, 0)
    assert f"install -d -m 700 -o {user} /nowhere/outbox" in said and "chown" not in said
    assert [f"chmod 600 {file}" in shut[0], f"chmod 700 {own}" in shut[1]] == [True, True], shut
    assert files.make_trouble(str(tmp_path / "a/b"), False) == ""


@pytest.mark.root
@pytest.mark.skipif(not is_root(), reason="needs root: owners")
def test_files_that_somebody_else_left_are_named_and_kept(folder: Path) -> None:
    with LocalBroker() as broker:
        agent = AgentProcess(folder, broker.port)
        with agent:
            wait_for(lambda: (folder / "state/state").exists(), say=agent.said)
        left = (folder / "state/state").read_bytes()
        os.chown(folder / "state/state", 0, 0)
        segment = next((folder / "outbox").iterdir())
        os.chown(segment, 0, 0)
        for path in (folder / "state/state", segment):
            path.chmod(0o600)
        agent = AgentProcess(folder, broker.port)
        with agent:
            wait_for(lambda: f"chown 65534 {segment}" in agent.said(), say=agent.said)
            assert f"chown 65534 {folder}/state/state; set aside as {folder}/state/state.bad" in agent.said()
        assert (folder / "state/state.bad").read_bytes() == left
