"""The benchmark of the collector, in short: it measures what it says, and both collectors store all reports."""

import argparse
from pathlib import Path

import pytest
from fleet_support import needs_mosquitto
from stonechat_tools.bench import fleet
from stonechat_tools.proofs.postgres_server import missing


@pytest.mark.slow(10)
@needs_mosquitto
def test_the_figures_are_there_and_the_bulk_reader_is_cheaper(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    fleet.add_arguments(parser)
    words = ["--devices", "20", "200", "--reports", "4000", "--rounds", "1", "--folder", str(tmp_path)]
    figures = fleet.run(parser.parse_args(words))
    kinds = {fleet.OWN, fleet.OWN_311, fleet.OWN_PAHO, fleet.PEER}
    if not missing():
        kinds.add(fleet.OWN_POSTGRES)
    assert set(figures["devices"]) == {"20", "200"} and set(figures["compared"]) == kinds
    assert 50 < figures["devices"]["200"]["bytes_per_report"] < 2000
    assert figures["ratios"][f"CPU of {fleet.PEER} / {fleet.OWN}"] > 1.5
