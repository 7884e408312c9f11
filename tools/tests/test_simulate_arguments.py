"""`stonechat simulate`: what it refuses, each in one line, before a broker or a device starts."""

import os
from pathlib import Path

import pytest
from stonechat_tools.cli import main


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--devices=0"], "--devices 0"),
        (["--devices=100000000"], "from 1 to 5000"),
        (["--heartbeat=-1"], "--heartbeat -1"),
        (["--heartbeat=1000000000000000000000000000000"], "--heartbeat 1000"),
        (["--for=nan"], "--for nan"),
        (["--for=-1"], "--for -1"),
        (["--for=1e30"], "--for 1e+30"),
        (["--attack-after=inf"], "--attack-after inf"),
        (["--speed=0"], "--speed 0"),
        (["--model=/dev/zero"], "more than"),
        (["--model=none"], "--model none"),
        (["--attack=mirai:x"], "mirai:x"),
        (["--attack=other:5%"], "other"),
        (["--broker=localhost"], "--keys-out"),
    ],
)
def test_bad_arguments_cost_one_line(
    arguments: list[str],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", "--for=0.1", *arguments]) == 1
    written = capsys.readouterr().err
    assert error in written and written.count("\n") == 1 and "unexpected" not in written
    assert not os.listdir(tmp_path)
