"""The files that `provision` makes: modes, configurations, what is refused."""

import os
from pathlib import Path

import pytest
from stonechat.errors import ConfigError
from stonechat.linux import config
from stonechat_tools.fleet import keyring, provision


def test_secrets_are_private_and_stay_unprinted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stonechat_tools.cli import main

    os.umask(0o022)
    base = str(tmp_path / "f")
    assert main(["provision", "--dir", base, "init", "--broker", "h", "--auth", "passwords"]) == 0
    assert main(["provision", "--dir", base, "add", "a", "b"]) == 0
    assert main(["provision", "--dir", base, "rotate", "a"]) == 0
    assert main(["provision", "--dir", base, "list"]) == 0
    assert main(["provision", "--dir", base, "revoke", "b"]) == 0
    assert main(["broker-config", "--dir", base, "--user", "nobody-at-all"]) == 0
    said = capsys.readouterr()
    secrets = [line for path in tmp_path.rglob("*.key") for line in path.read_text().split()]
    secrets += [path.read_text().strip() for path in tmp_path.rglob("password")]
    assert len(secrets) > 5
    for secret in secrets:
        assert secret not in said.out + said.err
    public = {"ca.crt", "client.crt", "server.crt", "old.crt", "crl.pem", "mosquitto.conf"}
    for path in tmp_path.rglob("*"):
        mode = path.stat().st_mode & 0o777
        if path.is_dir():
            assert mode == 0o700, path
        elif path.name not in public:
            assert mode == 0o600, path


@pytest.mark.parametrize("auth", provision.AUTHS)
def test_the_devices_configuration_is_one_the_agent_takes(auth: str, tmp_path: Path) -> None:
    port = 443 if auth == "managed" else 8883
    settings = provision.Settings(
        "b.example", port, fleet="west", prefix="v/1", auth=auth, alpn="mqtt", username_file="/u"
    )
    place = provision.Fleet.init(tmp_path / "f", settings).add("pump-1")
    loaded = config.load(str(place / "stonechat.toml"))
    assert loaded["device"]["id"] == "pump-1" and loaded["device"]["fleet"] == "west"
    assert loaded["mqtt"]["port"] == port and loaded["mqtt"]["alpn"] == "mqtt"
    assert loaded["mqtt"]["username_file"] == "/u"
    assert loaded["mqtt"]["tls"] is (auth != "plain")
    assert len(keyring.read_secrets(place / "device.key")[0]) == 32


def test_what_is_refused(tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883, auth="plain"))
    fleet.add("pump-1")
    for bad in ("collector", "a/b", "+", "#", "", "..", "a b", "x" * 65, "pump-1"):
        with pytest.raises(ConfigError):
            fleet.add(bad)
    for bad in ("pump-9", "../keys/pump-1"):
        for act in (fleet.rotate, fleet.finish_rotation, fleet.revoke):
            with pytest.raises(ConfigError):
                act(bad)
    with pytest.raises(ConfigError):
        provision.Fleet(tmp_path)
    with pytest.raises(ConfigError):
        provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883))
