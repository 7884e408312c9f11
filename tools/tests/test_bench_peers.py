"""A quiet beacon in a device's replayed traffic, through the agent's own code."""

import argparse
from pathlib import Path

import pytest
from stonechat.errors import ConfigError
from stonechat_tools.bench import peers
from stonechat_tools.traces.format import TraceError

DATA = Path(__file__).resolve().parents[3] / "shared/data/iot-lan"


def figures(capsys: pytest.CaptureFixture[str], *words: str) -> dict[int, dict]:
    parser = argparse.ArgumentParser()
    peers.add_arguments(parser)
    figures = peers.run(parser.parse_args([*words]))["windows"]
    assert "beside" in capsys.readouterr().out
    return figures


@pytest.mark.slow(2)
def test_a_beacon_to_a_new_host_is_found_beside_a_stream_and_two_thousand_windows_are_silent(capsys):
    for seconds, hours, windows in ((60, 10, 2000), (5, 1, 500)):  # `stonechat bench peers` has 2,000 of both
        words = ("--window", str(seconds), "--learn-hours", str(hours), "--windows", str(windows), "--beacons", "1")
        row = figures(capsys, *words)[seconds]
        assert row["alarms"] == row["peer_alarms"] == 0 and row["benign_windows"] == windows
        assert all(found is not None and found <= 15 for found in row["beacons_to_alarm"]), row
        assert row["bytes_a_minute"] > 10_000_000


@pytest.mark.slow(2)
@pytest.mark.parametrize("camera", ["skyworth_camera", "hichip_battery_camera"])
def test_the_same_in_a_real_camera(camera, capsys):
    files = sorted(str(path) for path in DATA.glob(f"{camera}_2020*.csv.gz"))
    if not files:
        pytest.skip(f"no captures in {DATA}")
    row = figures(capsys, *files, "--window", "60", "--beacons", "1", "--learn-hours", "12", "--jitter", "0.25")[60]
    assert row["peer_alarms"] == 0
    assert all(found is not None and found <= 15 for found in row["beacons_to_alarm"]), row


def test_a_row_that_is_none_is_named(tmp_path):
    path = tmp_path / "flows.csv"
    path.write_text("ts,dur,out,peer,bytes_out,bytes_in,pkts_out,pkts_in\n1.0,0,1,10.0.0.9,x,1,1,1\n")
    with pytest.raises(TraceError, match="flows.csv:2"):
        peers.read(path, None)
    path.write_text("ts,id.orig_h,id.resp_h,id.resp_p,proto\n1.0,10.0.0.1,10.0.0.9,80,tcp\n")
    with pytest.raises(TraceError, match="--device"):
        peers.read(path, None)


@pytest.mark.parametrize(
    "words",
    [
        ["--window", "0"],
        ["--window", "5,x"],
        ["--window", ""],
        ["--learn-hours", "0"],
        ["--windows", "-5"],
        ["--period", "nan"],
        ["--jitter", "2"],
        ["--beacons", "-1"],
        ["--exfil", "0"],
    ],
)
def test_an_argument_that_makes_no_sense_is_named(words):
    parser = argparse.ArgumentParser()
    peers.add_arguments(parser)
    with pytest.raises(ConfigError, match=f"^{words[0]} .*: want "):
        peers.run(parser.parse_args(words))


def test_a_file_without_a_flow_of_the_device_is_named(tmp_path):
    path = tmp_path / "flows.csv"
    path.write_text("ts,dur,out,peer,bytes_out,bytes_in,pkts_out,pkts_in\n1.0,0,0,10.0.0.9,5,1,1,1\n")
    parser = argparse.ArgumentParser()
    peers.add_arguments(parser)
    with pytest.raises(TraceError, match="flows.csv: no flow"):
        peers.run(parser.parse_args([str(path)]))
