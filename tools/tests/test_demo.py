"""The demo: its judgement of itself, and one short run of the whole pipeline."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stonechat_tools import demo

STONECHAT = str(Path(sys.executable).parent / "stonechat")


def figures(**changes: Any) -> dict[str, Any]:
    attack = {"name": "miner", "alarmed": True, "windows_to_alarm": 2, "top_features": ["cpu_busy"], "explained": True}
    whole = {
        "learning_windows": 20,
        "benign_windows": 15,
        "false_alarms": 0,
        "attacks": [dict(attack) for _ in range(5)],
        "reports_published": 70,
        "reports_stored": 70,
        "reports_seen_by_subscriber": 70,
        "subscriber": "mosquitto_sub",
        "agent_cpu_percent": 0.3,
        "agent_rss_bytes": 25_000_000,
        "transport": "paho",
    }
    return whole | changes


def test_a_whole_run_is_called_whole() -> None:
    assert demo.worked(figures()) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reports_stored": 30}, "30 reports were stored"),
        ({"reports_seen_by_subscriber": 60}, "did not see"),
        ({"false_alarms": 1}, "in alarm"),
        ({"attacks": [{"name": "a", "alarmed": index < 3} for index in range(5)]}, "only 3 of 5"),
    ],
)
def test_what_did_not_work_is_said(changes: dict[str, Any], says: str) -> None:
    assert says in str(demo.worked(figures(**changes)))


def test_four_of_five_will_do() -> None:
    attacks = [{"name": "a", "alarmed": index < 4} for index in range(5)]
    assert demo.worked(figures(attacks=attacks)) is None


def test_the_summary_names_attacks_and_costs() -> None:
    out = io.StringIO()
    for part in demo.summary(figures()):
        Console(file=out, width=120).print(part)
    assert "miner" in out.getvalue() and "cpu_busy" in out.getvalue() and "25.0 MB" in out.getvalue()


def test_an_unknown_attack_is_one_line() -> None:
    done = subprocess.run([STONECHAT, "demo", "--attacks", "sorcery"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "sorcery" in done.stderr and "scan_connect" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(360)  # it may have to learn twice
def test_one_attack_through_the_whole_pipeline(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [STONECHAT, "demo", "--attacks", "scan_connect", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=330)
    assert out.exists(), done.stdout + done.stderr
    got = json.loads(out.read_text())
    assert got["reports_stored"] == got["reports_published"] == got["reports_seen_by_subscriber"]
    assert got["reports_stored"] >= got["learning_windows"] + got["benign_windows"] + 2
    assert got["agent_rss_bytes"] < 26_000_000
    assert [attack["name"] for attack in got["attacks"]] == ["scan_connect"]
