"""`stonechat report` on texts that a device with an authentic key chose: they are printed, never read as markup."""

from pathlib import Path

import cbor2
import pytest
from stonechat_tools.cli import main
from stonechat_tools.fleet import wire
from stonechat_tools.fleet.keyring import DeviceKeys
from stonechat_tools.fleet.store import Store

TEXTS = ["/", "/red", "link=file:///etc/passwd]click[/link", "blink]x", "red]ALARM: none[/", "[bold]", "[/]", "\\[x]"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("more", [[], ["--json"], ["--terminal"]], ids=["table", "json", "terminal"])
def test_a_text_of_a_device_is_never_markup(
    text: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    keys = DeviceKeys(b"\1" * 32, "d-1")
    fields = {0: 1, 1: 1, 2: 1, 3: 1_790_000_000, 5: 2, 7: 9, 8: 9, 9: 9, 13: text, 16: b"abcd"}
    status = {0: 1, 2: 1, 3: 1_790_000_000, 4: 9, 5: True, 6: 1, 7: text, 11: [text], 14: text, 16: b"abcd"}
    with Store(tmp_path / "db") as store:
        report = wire.open_report("d-1", keys, keys.report.seal(cbor2.dumps(fields, canonical=True)))
        opened = wire.open_status("d-1", keys, keys.status.seal(cbor2.dumps(status, canonical=True)))
        store.put([report], [opened])
    for arguments in (["report", "d-1"], ["report"]):
        assert main([*arguments, "--db", str(tmp_path / "db"), *(more if arguments[1:] else [])]) == 0
    shown = capsys.readouterr().out
    assert more or text in shown
