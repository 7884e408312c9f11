"""`stonechat bench inference` measures every runtime that is installed, and says which ones are not."""

import argparse
import json
from pathlib import Path

import pytest
from stonechat_tools.bench import inference
from stonechat_tools.proofs.interpreters import Interpreter, interpreters

MODEL = Path(__file__).resolve().parents[2] / "firmware_tests" / "golden" / "dense-tensor" / "model.tflite"


def test_it_measures_side_by_side(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    here = [one for one in interpreters() if one.name == "unix-x64"]
    monkeypatch.setattr(inference, "interpreters", lambda: [*here, Interpreter("gone", (), "not installed")])
    parser = argparse.ArgumentParser()
    inference.add_arguments(parser)
    figures = json.loads(json.dumps(inference.run(parser.parse_args([str(MODEL), "--seconds", "0.05"]))))
    runs = figures["runs"]
    assert runs["own plain, gone"] == {"missing": "not installed"}
    own = runs["own plain, CPython"]
    assert set(own) == {"best_us", "middle_us", "start_ms", "rss_kb", "allocated_bytes", "sha256"}
    assert own["best_us"] <= own["middle_us"] and own["rss_kb"] > 5000
    exact = ["tflite-micro, CPython", "tflite-runtime reference, CPython", "own plain, unix-x64", "own viper, unix-x64"]
    for name in exact:
        if "missing" not in runs[name]:
            assert runs[name]["sha256"] == own["sha256"], name
    if not here[0].missing:
        assert runs["own viper, unix-x64"]["allocated_bytes"] == 0
        assert figures["ratios"]["own viper, unix-x64: times faster than own plain there"] > 1
    assert "own plain, CPython" in capsys.readouterr().out
