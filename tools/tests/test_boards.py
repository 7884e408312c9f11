"""The emulated boards that `make boards` has built: a deployment over the serial port, and the golden vectors."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_support import Mosquitto, broker, needs_mosquitto, wait_for
from netns import needs_root
from stonechat.errors import StonechatError
from stonechat_tools import cli
from stonechat_tools.bench import emulated
from stonechat_tools.device.deploy import mpremote
from stonechat_tools.fleet import provision
from stonechat_tools.fleet.store import Store
from stonechat_tools.modeling import inspect
from stonechat_tools.proofs.boards import power_cuts, ppp, trials, uart
from stonechat_tools.proofs.boards.firmware import BUILDS, DISKS, Board, BuildError, build_all
from stonechat_tools.proofs.boards.machine import MACHINES, BoardError, Machine, simulator
from stonechat_tools.proofs.boards.prove import PRELUDE, Result, files_of, golden

M3, PICO, RP2040 = (next(board for board in BUILDS if board.name == name) for name in ("m3", "pico", "rp2040"))
ROOT = Path(__file__).resolve().parents[2]
__all__ = ["broker"]
built = pytest.mark.skipif(M3.missing is not None, reason=f"Cortex-M3: {M3.missing}")


def test_every_board_has_a_machine_and_a_disk() -> None:
    for board in BUILDS:
        if board.port == "qemu":
            assert board.name in MACHINES
            assert board.folder in DISKS
    compile(PRELUDE, "prelude.py", "exec")


def test_a_board_that_there_is_not_is_named() -> None:
    with pytest.raises(BuildError, match="no board esp32: there are m0, m3, m7, rv32, rp2040"):
        build_all(["esp32"])


@contextlib.contextmanager
def serial_port(board: Board) -> Iterator[str]:
    """An emulated board with an empty file system -> its serial port, a terminal of this machine."""
    if board.port == "qemu":
        command = [*MACHINES[board.name], "-nographic", "-monitor", "null", "-semihosting", "-serial", "pty", "-kernel"]
        with subprocess.Popen(
            [*command, str(board.path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout
            found = re.search(r"/dev/pts/\d+", process.stdout.readline())
            assert found
            yield found[0]
            process.kill()
        return
    master, slave = os.openpty()
    tty.setraw(slave)
    with subprocess.Popen(["node", str(simulator()), str(board.path)], stdin=master, stdout=master) as process:
        yield os.ttyname(slave)
        process.kill()
    os.close(master)
    os.close(slave)


@pytest.mark.skipif(RP2040.missing is not None, reason=f"RP2040: {RP2040.missing}")
def test_the_faster_simulator_does_what_the_package_does() -> None:
    """Every register, byte of memory and cycle, from reset until MicroPython waits for its first line and beyond."""
    command = ["node", str(simulator()), str(RP2040.path), "--digest=6000000"]
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(subprocess.Popen([*command, *more], stdin=subprocess.PIPE, stderr=subprocess.PIPE))
            for more in ([], ["--plain"])
        ]
        digests = [process.stderr.read() for process in runs if process.stderr]
    assert digests[0] == digests[1] and b" cycles" in digests[0], digests


@pytest.mark.skipif(RP2040.missing is not None, reason=f"RP2040: {RP2040.missing}")
def test_a_board_that_was_slow_does_not_catch_up_in_its_waits() -> None:
    """Else the seconds in which it waits for a peer of this machine pass in a moment."""
    with Machine(RP2040, paced=True) as machine:
        os.kill(machine.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(machine.pid, signal.SIGCONT)
        machine.run("import time")
        began = time.monotonic()
        machine.run("time.sleep(1)")
        assert time.monotonic() - began > 0.9


@built
def test_deploy_over_a_serial_port(capsys: pytest.CaptureFixture[str]) -> None:
    with serial_port(M3) as port:
        assert cli.main(["deploy", "--port", port, "--model", "micropython-1", "--no-reset"]) == 0
    printed = capsys.readouterr().out
    assert "mps2-an385 with Cortex-M3, MicroPython 1.25" in printed
    assert "4 golden vectors: byte-equal on the board" in printed


@pytest.mark.slow(20)
@pytest.mark.skipif(RP2040.missing is not None, reason=f"RP2040: {RP2040.missing}")
def test_the_boards_section_of_the_readme_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands, but for the port; then its main.py, as far as the loop, on the board that they have made."""
    section = (ROOT / "README.md").read_text().partition("\n## A board in three commands\n")[2].partition("\n## ")[0]
    lines = [line.split("#")[0] for line in section.splitlines() if line.startswith("$ stonechat ")]
    commands = [command.strip().lstrip("$ ") for line in lines for command in line.split("&&")]
    assert [command.split()[1] for command in commands] == ["provision", "provision", "deploy"]
    main = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[1].partition("while True")[0]
    monkeypatch.chdir(tmp_path)
    with serial_port(RP2040) as port:
        for command in commands:
            words = shlex.split(command.replace("/dev/ttyACM0", port))[1:]
            assert cli.main([*words, "--no-reset"] if words[0] == "deploy" else words) == 0, command
        assert "4 golden vectors: byte-equal on the board" in capsys.readouterr().out
        script = main + "watch.tick()\nprint('RUNS', watch.agent.reporter.topic, open('boot.py').read())"
        done = subprocess.run(
            [*mpremote(), "connect", port, "exec", script], capture_output=True, text=True, timeout=600
        )
    assert "RUNS stonechat/1/fleet/sensor-7/ from stonechat.board import hooks" in done.stdout, done


@built
def test_the_board_keeps_its_files_and_says_what_went_wrong(tmp_path: Path) -> None:
    with Machine(M3) as machine:
        machine.put("/a/b.bin", bytes(range(256)) * 20)
        machine.restart()
        assert machine.run("import os\nprint(os.stat('/a/b.bin')[6])").strip() == "5120"
        with pytest.raises(BoardError, match="ZeroDivisionError"):
            machine.run("1 / 0")
    with Machine(M3, files=files_of(M3, tmp_path, [])) as machine:
        result = Result("m3", "Cortex-M3")
        golden(machine, result, ["dense-tensor", "micropython-1"])
        assert result.golden == {"plain": 44, "viper": 44} and result.proved


@needs_mosquitto
@pytest.mark.slow(20)
@pytest.mark.skipif(PICO.missing is not None, reason=f"Pico: {PICO.missing}")
def test_a_plain_pico_reports_over_its_uart_to_a_collector(tmp_path: Path, broker: Mosquitto) -> None:
    """The example as it is: no socket module, publish= over the UART, forward.py, and acknowledgements back."""
    fleet = provision.Fleet.init(tmp_path / "fleet", provision.Settings("localhost", broker.port, auth="plain"))
    fleet.add("sensor-7")
    database = tmp_path / "reports.db"
    collect = [sys.executable, "-m", "stonechat_tools.cli", "collect", "--keys", str(fleet.folder / "keys"), "--plain"]
    with open(tmp_path / "log", "wb") as log:
        collector = subprocess.Popen([*collect, "--db", str(database)], stdout=log, stderr=log)
        try:
            address = f"127.0.0.1:{broker.port}"
            with uart.reporting(PICO, "sensor-7", fleet.secrets("sensor-7")[0], address):

                def heard() -> bool:
                    assert collector.poll() is None, (tmp_path / "log").read_text()
                    if not database.exists():
                        return False
                    with contextlib.suppress(StonechatError), Store(database) as store:
                        return store.count("sensor-7") >= 3 and bool(store.devices()[0]["online"])
                    return False

                assert wait_for(heard, 600), (tmp_path / "log").read_text()
        finally:
            collector.kill()
            collector.wait()
    with Store(database) as store:
        assert store.sequences("sensor-7")[:3] == [1, 2, 3]
        assert not store.rejections()


@built
@pytest.mark.slow(20)
def test_power_cuts_inside_flash_operations() -> None:
    result = power_cuts.lives(M3, 3)
    assert result.proved and result.cuts == 3, str(result)


@built
@pytest.mark.slow
def test_a_firmware_that_takes_all_memory_gets_no_error_from_the_agent(capsys: pytest.CaptureFixture[str]) -> None:
    assert trials.main(["m3", "--only", "watchdog,heap"]) == 0
    said = capsys.readouterr().out
    assert "m3 watchdog: left out, its port has no machine.WDT" in said and "nothing raised; memory again: 5" in said
    assert trials.main(["m3", "--only", "naps"]) == 1


def test_ppp_frames_come_back_as_they_were_and_damaged_ones_do_not() -> None:
    for payload in (b"", bytes(range(256)), b"\x7e\x7d" * 700):
        inside = ppp.framed(0x0021, payload).strip(b"\x7e")
        assert ppp.unframed(inside) == (0x0021, payload)
        for at in range(0, len(inside), 7):
            assert ppp.unframed(inside[:at] + bytes([inside[at] ^ 1]) + inside[at + 1 :]) != (0x0021, payload)
    assert ppp.fcs(b"123456789") ^ 0xFFFF == 0x906E  # X-25's check value
    body = b"\x21ip"  # a peer that was allowed to leave address and first byte of the protocol out
    body += (ppp.fcs(body) ^ 0xFFFF).to_bytes(2, "little")
    assert ppp.unframed(body) == (0x21, b"ip")
    for cut in (b"", b"\x7d", b"\xff\x03", b"ab"):
        assert ppp.unframed(cut) is None


def test_ppp_gives_the_board_its_address_and_refuses_other_options() -> None:
    line, ours = socket.socketpair()
    with line, ours:
        peer = ppp.Peer(ours.fileno(), -1)

        def asked(protocol: int, options: bytes) -> list[tuple[int, bytes]]:
            peer._take(protocol, bytes([1, 7, 0, 4 + len(options)]) + options)
            frames = [ppp.unframed(frame) for frame in line.recv(4096).split(b"\x7e") if frame]
            return [(got[1][0], got[1][4:]) for got in frames if got and got[0] == protocol]

        unset, given = b"\x03\x06\0\0\0\0", b"\x03\x06\x0a\x4d\0\x02"
        own = b"\x03\x06\x0a\x4d\0\x01"
        for _ in range(2):  # a board that was reset asks again, and wants the other end to ask again
            assert asked(0x8021, unset + b"\x81\x06\0\0\0\0") == [(4, b"\x81\x06\0\0\0\0")]
            assert asked(0x8021, unset) == [(3, given)]
            assert asked(0x8021, given) == [(2, given), (1, own)]
        peer._take(0x8057, b"\x01\x01\0\x04")
        frame = ppp.unframed(line.recv(4096).strip(b"\x7e"))
        assert frame and frame[0] == 0xC021 and frame[1][0] == 8


@needs_root
@needs_mosquitto
@pytest.mark.slow(20)
@pytest.mark.skipif(RP2040.missing is not None, reason=f"RP2040: {RP2040.missing}")
def test_an_rp2040_reports_over_ppp_to_mosquitto_and_a_collector() -> None:
    arrived = ppp.report(RP2040, 2)
    assert arrived.stored[:2] == [1, 2] and arrived.acknowledged == 2 and not arrived.errors, arrived


def test_the_readme_has_the_figures_of_the_last_run() -> None:
    lines = (ROOT / "README.md").read_text().split("\n")
    for row in emulated.readme(inspect.emulated()):
        assert row in lines, row
    page = (ROOT / "docs/agent-boards.md").read_text()
    core, full = (inspect.emulated()["figures"][f"rp2040 {profile} now"] for profile in emulated.PROFILES)
    for source, label in (("files", "`.mpy` files"), ("ROMFS", "ROMFS"), ("frozen", "frozen with")):
        name = f"least heap, {source}"
        row = next(line for line in page.split("\n") if line.startswith(f"| {label}"))
        assert [f"{core[name][0]:,}", f"{full[name][0]:,}"] == re.findall(r"\d+,\d{3}", row)


@built
@pytest.mark.slow(20)
def test_the_bench_on_an_emulated_board(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "board", "--emulated", "m3", "--json", str(tmp_path / "figures.json")]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert not found["failed"] and set(found["figures"]) == {"m3 core now", "m3 full now"}
    for one in found["figures"].values():
        assert one["inference"][1] == one["5760"][1] == one["tick"][1] == 0
        assert 0 < one["5760"][0] < 40 * 5760
    assert found["optional_bytes"]["full"]["board/tls"] == 0 < found["optional_bytes"]["core"]["board/tls"]
    assert "a MAC, of 5,760" in capsys.readouterr().out


def test_the_bench_names_a_board_that_it_can_not_measure(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("esp32", "m0"):
        assert cli.main(["bench", "board", "--emulated", name]) == 1
        assert f"--emulated {name}: there are m3, m7, rv32, rp2040, pico" in capsys.readouterr().err
