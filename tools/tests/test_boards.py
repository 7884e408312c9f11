"""The emulated boards that `make boards` has built: a deployment over the serial port, and the golden vectors."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_support import Mosquitto, broker, needs_mosquitto, wait_for
from stonechat.errors import StonechatError
from stonechat_tools import cli
from stonechat_tools.fleet import provision
from stonechat_tools.fleet.store import Store
from stonechat_tools.proofs.boards import uart
from stonechat_tools.proofs.boards.firmware import BUILDS, DISKS, BuildError, build_all
from stonechat_tools.proofs.boards.machine import MACHINES, BoardError, Machine
from stonechat_tools.proofs.boards.prove import PRELUDE, Result, files_of, golden

M3, PICO = (next(board for board in BUILDS if board.name == name) for name in ("m3", "pico"))
__all__ = ["broker"]
built = pytest.mark.skipif(M3.missing is not None, reason=f"Cortex-M3: {M3.missing}")


def test_every_board_has_a_machine_and_a_disk() -> None:
    for board in BUILDS:
        if board.name != "rp2040":
            assert board.name in MACHINES
            assert board.make[0].partition("=")[2] in DISKS
    compile(PRELUDE, "prelude.py", "exec")


def test_a_board_that_there_is_not_is_named() -> None:
    with pytest.raises(BuildError, match="no board esp32: there are m0, m3, m7, rv32, rp2040"):
        build_all(["esp32"])


@pytest.fixture
def serial_port() -> Iterator[str]:
    """An emulated Cortex-M3 with an empty file system, its serial port a terminal of this machine."""
    command = [*MACHINES["m3"], "-nographic", "-monitor", "null", "-semihosting", "-serial", "pty", "-kernel"]
    with subprocess.Popen(
        [*command, str(M3.path)],
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


@built
def test_deploy_over_a_serial_port(serial_port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["deploy", "--port", serial_port, "--model", "micropython-1", "--no-reset"]) == 0
    told = capsys.readouterr().out
    assert "mps2-an385 with Cortex-M3, MicroPython 1.25" in told
    assert "4 golden vectors: byte-equal on the board" in told


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
@pytest.mark.slow
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
