"""The emulated boards that `make boards` has built: a deployment over the serial port, and the golden vectors."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from stonechat_tools import cli
from stonechat_tools.proofs.boards.firmware import BUILDS, DISKS, BuildError, build_all
from stonechat_tools.proofs.boards.machine import MACHINES, BoardError, Machine
from stonechat_tools.proofs.boards.prove import PRELUDE, Result, files_of, golden

M3 = next(board for board in BUILDS if board.name == "m3")
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
