"""The golden vectors are what the reference runtimes answer today, and golden.json stays small enough for a board."""

import json
from pathlib import Path

import pytest
from stonechat.errors import ModelError
from stonechat.linux.tflite_runtime import TfliteRuntime
from stonechat_tools.modeling import golden
from stonechat_tools.modeling.oracles import TfliteMicro

pytest.importorskip("tflite_micro")
pytest.importorskip("tflite_runtime")
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [
    folder
    for home in ("firmware_tests/golden", "models")
    for folder in sorted((ROOT / home).iterdir())
    if (folder / "golden.json").exists()
]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_reference_answers_so(folder: Path) -> None:
    data = (folder / "model.tflite").read_bytes()
    record = json.loads((folder / "golden.json").read_text())
    micro, other = TfliteMicro(data, keep_layers=True), TfliteRuntime(data)
    assert len(record["vectors"]) >= 4
    for x, y, layers in record["vectors"]:
        assert micro.run(bytes.fromhex(x)).hex() == y
        assert [micro.layer(tensor).hex() for tensor in record["tensors"]] == layers
        assert bytes(other.run(bytes.fromhex(x))).hex() == y


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_names_its_runtime_and_is_small(folder: Path) -> None:
    text = (folder / "golden.json").read_text()
    record = json.loads(text)
    assert record["format"] == 1
    assert record["runtime"].startswith("tflite-micro ") and record["resolver"]
    assert any("BUILTIN_REF" in other for other in record["agrees"])
    assert len(text) < 32_768


def test_it_is_written_beside_the_model(tmp_path: Path) -> None:
    source = ROOT / "firmware_tests" / "golden" / "extreme"
    (tmp_path / "model.tflite").write_bytes((source / "model.tflite").read_bytes())
    path = golden.write_golden(tmp_path, 12)
    assert path == tmp_path / "golden.json"
    assert json.loads(path.read_text()) == json.loads((source / "golden.json").read_text())


def test_runtimes_that_disagree_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(TfliteRuntime):
        def run(self, x: bytes) -> bytes:
            return bytes(byte ^ 1 for byte in super().run(x))

    monkeypatch.setattr(golden, "TfliteRuntime", Wrong)
    with pytest.raises(ModelError, match="disagree"):
        golden.make((FOLDERS[0] / "model.tflite").read_bytes())
