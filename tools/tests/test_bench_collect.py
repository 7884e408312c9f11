"""`stonechat bench collect`, in small: every subject measured, every figure there, every reason stated."""

import argparse
import json
import os
from pathlib import Path

import pytest
from stonechat.errors import ConfigError
from stonechat.linux.proc import ProcCollector
from stonechat_tools.bench import bpf, collect
from stonechat_tools.bench.collect import PROC, PSUTIL, PSUTIL_COUNTERS


def test_figures_in_small(monkeypatch, capsys):
    pytest.importorskip("psutil")
    monkeypatch.setattr(bpf, "measure", _refuse)
    parser = argparse.ArgumentParser()
    collect.add_arguments(parser)
    figures = collect.run(parser.parse_args(["--sockets", "10", "60", "--rounds", "1", "--turns", "1"]))
    assert list(figures["sockets"]) == ["10", "60"]
    for costs in figures["sockets"].values():
        assert {PROC, PSUTIL, PSUTIL_COUNTERS} <= set(costs)
        assert all(cost["best_us"] > 0 and cost["rss_kib"] > 1000 for cost in costs.values())
    assert figures["kernel"] is None
    assert figures["left_out"]["overhead in the kernel"] == "Operation not permitted"
    if figures["services"] is not None:  # where BPF and cgroup v2 are
        assert figures["services"]["services"] == 8 and figures["services"]["window"]["today_us"] > 0
    else:
        assert figures["left_out"]["services"]
    assert figures["ratios"][f"CPU of {PSUTIL} / {PROC}, 10 sockets"] > 0
    assert json.loads(json.dumps(figures)) == figures
    assert "left out: overhead in the kernel: Operation not permitted" in capsys.readouterr().out


def _refuse():
    raise OSError("Operation not permitted")


def test_sockets_are_held_and_let_go():
    collector = ProcCollector()
    values = [0] * len(collector.schema)
    estab = [column[0] for column in collector.schema.columns].index("estab")
    collector.read(values)
    before = values[estab]
    with collect.held_sockets(100) as opened:
        assert opened == 100
        collector.read(values)
        assert values[estab] >= before + 90
    collector.read(values)
    assert values[estab] < before + 90


def test_a_subject_that_does_not_start_says_why():
    with pytest.raises(OSError, match="ModuleNotFoundError: No module named 'nothing_of_that_name'"):
        collect.Subject("import nothing_of_that_name\ndef sample(): pass\n")


def test_a_bare_interpreter_is_smaller_than_this_one():
    own_kib = int(Path(f"/proc/{os.getpid()}/status").read_text().split("VmRSS:")[1].split()[0])
    assert 1000 < collect.interpreter_rss_kib() < own_kib


@pytest.mark.parametrize("words", [["--sockets", "5", "-3"], ["--rounds", "0"], ["--turns", "-1"]])
def test_an_argument_that_makes_no_sense_is_named(words):
    parser = argparse.ArgumentParser()
    collect.add_arguments(parser)
    with pytest.raises(ConfigError, match=f"^{words[0]} {words[-1]}: want at least"):
        collect.run(parser.parse_args(words))
