"""`stonechat soak rollout` in short: real agents on MicroPython take version 2, refuse version 3, and are all back.

In one stage; test_docs_releases.py has two, the command itself three."""

from pathlib import Path

import pytest
from fleet_support import needs_mosquitto
from stonechat_tools.fleet import collector, rollout_judge
from stonechat_tools.fleet.store import retention
from stonechat_tools.proofs import rollout_fleet
from stonechat_tools.proofs.interpreters import interpreters


@needs_mosquitto
@pytest.mark.slow(45)
@pytest.mark.skipif(all(one.missing for one in interpreters()), reason="no MicroPython here (make setup)")
def test_boards_take_a_release_refuse_a_bad_one_and_come_back(tmp_path: Path) -> None:
    said: list[str] = []
    failures = rollout_fleet.run(tmp_path, 0, 2, said.append, window_ms=400, stages="100%:2s")
    assert not failures, failures
    assert "board 3: 2 of 2 devices failed; 1% fail anyway: unsuited" in said


def test_the_collector_with_short_days_shortens_what_is_there() -> None:
    """`soak rollout` itself takes a minute for it."""
    for module, name in (
        (rollout_judge, "DAY_S"), (rollout_judge, "DAY_LATE_S"), (retention, "BEHIND_S"), (collector, "RETAIN_S"),
        (collector, "RETAIN_BUSY_S"),
    ):  # fmt: skip
        assert isinstance(getattr(module, name), (int, float))
    assert [table for table, _ in retention._TABLES] == ["hourly", "daily"]
