"""The benchmark of the response, short: what it says must be so."""

import argparse
import sys
from pathlib import Path

import pytest
import stonechat
from netns import needs_root
from stonechat.policy import QUARANTINE, THROTTLE
from stonechat_tools.bench import board, respond

sys.path.append(str(Path(__file__).resolve().parents[2] / "firmware_tests"))

from targets import targets  # noqa: E402


@needs_root
@pytest.mark.slow(5)
@pytest.mark.parametrize("attack", ["frames"])
def test_a_quarantine_stops_an_attack_and_harms_nobody_on_the_list(attack):
    found = respond.measure(attack, QUARANTINE, 1.0)
    assert found["packets_before"] >= 8
    assert found["stopped_share"] > 0.5  # a busy machine may take a while until the rules are in force
    assert found["last_packet_s"] < 0.9
    assert found["benign_listed"][0] == 0
    assert found["benign_listed"][1] > 0


@needs_root
@pytest.mark.slow(5)
def test_a_false_alarm_in_throttle_leaves_a_device_its_day():
    assert respond.false_alarm("sensor", 2.0, throttled=True)["stopped"] == 0


@needs_root
@pytest.mark.slow(5)
def test_ransom_goes_on_in_a_quarantine():
    assert respond.untouched("ransom", 1.0)["work_goes_on_share"] > 0.3


@pytest.mark.parametrize("target", targets()[:2], ids=lambda target: target.name)
def test_a_guard_that_is_off_costs_a_board_s_calls_next_to_nothing(target):
    if target.missing:
        pytest.skip(f"{target.name}: {target.missing}")
    agent = Path(stonechat.__file__).parent.parent  # its sources: nothing has to be built
    for _ in range(3):  # the least times of a busy machine differ by some percent
        found = board.measure(target.command, agent, Path("none"), "full", "guard", 4096)
        assert found is not None
        (hooked_bytes, hooked_us), (off_bytes, off_us) = found["sendto_hooked"], found["sendto_guard_off"]
        assert off_bytes == hooked_bytes and found["sendto_guard_on"][0] > off_bytes
        if off_us <= 1.1 * hooked_us:
            return
    raise AssertionError(found)


def test_the_verb_has_its_options():
    parser = argparse.ArgumentParser()
    respond.add_arguments(parser)
    assert parser.parse_args(["--attack", "frames"]).attack == ["frames"]
    assert respond.NAMES == {THROTTLE: "throttle", QUARANTINE: "quarantine"}
