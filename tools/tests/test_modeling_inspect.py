"""`stonechat inspect`: what it says of a model, and that its memory estimate is near what a 32-bit heap loses."""

import json
from pathlib import Path

import pytest
from stonechat.errors import ModelError
from stonechat_tools.cli import main
from stonechat_tools.modeling import inspect
from stonechat_tools.proofs.interpreters import interpreter

GOLDEN = Path(__file__).resolve().parents[2] / "firmware_tests" / "golden"
DENSE = GOLDEN / "dense-channel" / "model.tflite"


def facts(path: Path) -> dict:  # type: ignore[type-arg]
    return inspect.describe(path.read_bytes())


def test_it_says_what_is_in_a_model() -> None:
    said = facts(DENSE)
    assert said["macs"] == 19 * 11 + 11 * 5 + 5 * 11 + 11 * 19
    assert [layer["operator"] for layer in said["operators"]] == ["FULLY_CONNECTED"] * 4
    assert said["operators"][0]["weights"] == [11, 19] and said["operators"][0]["per_channel"]
    assert said["input"]["shape"] == [1, 19] and said["input"]["type"] == "int8"
    assert all("estimate" in name or "emulated" in name for name in said["run_us"] if "RP2040" in name)
    assert said["agent"]["more heap while TLS connects"] == "28,672 bytes" and " / " in said["agent"]["report"]
    assert said["agent"]["TLS handshake, password / certificate"] == "2,337 / 2,552 ms"
    assert not any("unix" in name for name in said["run_us"])  # what a unix port takes says nothing of a board


def test_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(DENSE)]) == 0
    printed = capsys.readouterr().out
    assert "FULLY_CONNECTED" in printed and len(printed.splitlines()) < 80
    assert main(["inspect", str(DENSE), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] == facts(DENSE)["macs"]


def test_layers_are_those_of_the_golden_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((DENSE.parent / "golden.json").read_text())
    x, y, layers = record["vectors"][5]
    assert main(["inspect", str(DENSE), "--json", "--layers", x]) == 0
    steps = json.loads(capsys.readouterr().out)["run"]
    assert [step["values"] for step in steps] == [list(memoryview(bytes.fromhex(h)).cast("b")) for h in (x, *layers)]
    assert layers[-1] == y


def test_inputs_as_hex_numbers_and_files(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"\x80\x00\x7f")
    assert inspect.read_input(str(file), 3) == b"\x80\x00\x7f"
    assert inspect.read_input("80007f", 3) == b"\x80\x00\x7f"
    assert inspect.read_input("-128,0,127", 3) == b"\x80\x00\x7f"
    for text in ("128,0,0", "zz", "8000"):
        with pytest.raises(ModelError):
            inspect.read_input(text, 3)


def test_a_file_that_is_no_model_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.tflite"
    file.write_bytes(b"not a model at all")
    assert main(["inspect", str(file)]) == 1
    assert "x.tflite: not a .tflite file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb",
    [
        "inspect MODEL",
        "trial MODEL",
        "simulate --model MODEL --devices 1",
        "build --arch armv6m --model MODEL --out OUT",
        "top --model MODEL --once",
    ],
)
def test_each_verb_names_the_model_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    model = tmp_path / "pump.tflite"
    model.write_bytes(b"no model at all")
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in verb.split()]) in (1, 2)
    assert f"{model}: " in capsys.readouterr().err


HELD = """
import gc
from stonechat.int8 import interpreter, plain, viper
from stonechat.model import load_model
gc.collect()
empty = gc.mem_alloc()
with open(sys.argv[1], "rb") as file:
    data = file.read() if sys.argv[2] == "memory" else file
    model = load_model(data, "viper", int(sys.argv[2] != "streamed") * 99999)
    del data
    gc.collect()
    print(gc.mem_alloc() - empty)
"""


@pytest.mark.parametrize("name", ["dense-channel", "dense-tensor", "wide", "extreme"])
def test_the_memory_estimate_is_near(name: str) -> None:
    micropython = interpreter("unix-i386")
    if micropython.missing:
        pytest.skip(f"unix-i386: {micropython.missing}")
    path = GOLDEN / name / "model.tflite"
    estimates = facts(path)["memory"]
    for how, label in (
        ("memory", "file in memory"),
        ("file", "from an open file"),
        ("streamed", "from an open file, weights streamed"),
    ):
        done = micropython.run(HELD, str(path), how)
        assert done.returncode == 0, done.stderr
        assert abs(int(done.stdout) / estimates[label] - 1) < 0.2, (label, done.stdout, estimates[label])
