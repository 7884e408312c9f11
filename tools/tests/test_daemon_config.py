"""The configuration: whatever is wrong gets one clear error that names the key and the fix."""

import tomllib
from typing import Any

import pytest
from stonechat.errors import ConfigError
from stonechat.linux import config

GOOD = """
[device]
id = "pump-17"
key_file = "/etc/stonechat/device.key"
[model]
file = "/etc/stonechat/model.tflite"
[mqtt]
host = "broker.example.org"
"""


def load(tmp_path: Any, text: str) -> dict[str, Any]:
    path = tmp_path / "stonechat.toml"
    path.write_text(text)
    return dict(config.load(str(path)))


def test_the_example_is_a_whole_valid_configuration(tmp_path: Any) -> None:
    loaded = load(tmp_path, config.example())
    assert loaded["mqtt"]["tls"] is True
    assert loaded["mqtt"]["port"] == 8883


def test_the_example_explains_every_key_and_uncommented_it_still_loads(tmp_path: Any) -> None:
    text = config.example()
    for section, keys in config.KEYS.items():
        assert f"[{section}]" in text
        for name in keys:
            assert f"{name} = " in text
    lines = []
    for line in text.splitlines():
        bare = line.removeprefix("# ")
        is_key = any(bare.startswith(name + " = ") for keys in config.KEYS.values() for name in keys)
        lines.append(bare if is_key else line)
    assert config.check(tomllib.loads("\n".join(lines)))["report"]["heartbeat_windows"] == 60


def test_defaults_are_filled_in(tmp_path: Any) -> None:
    loaded = load(tmp_path, GOOD)
    assert loaded["collector"]["bpf"] == "auto"
    assert loaded["report"]["free_on"] == "ack"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[mqtt]", "[mqt]"), "is it mqtt?"),
        (("host =", "hots ="), "is it host?"),
        (('id = "pump-17"', ""), "[device] needs id"),
        (('id = "pump-17"', 'id = "a/b"'), "without / + #"),
        (('id = "pump-17"', "id = 17"), "must be a text"),
        (("[mqtt]", "[mqtt]\nport = 70000"), "from 1 to 65535"),
        (("[mqtt]", '[mqtt]\ntls = "no"'), "true or false"),
        (("[mqtt]", '[mqtt]\ntransport = "carrier pigeon"'), 'one of "auto", "lean", "paho"'),
        (("[mqtt]", "[mqtt]\nport = true"), "whole number"),
        (("[model]", "[collector]\ninterfaces = [1]\n[model]"), "list of texts"),
        (("[model]", "[counters]\nlist = [{name = 2024-01-01}]\n[model]"), "[counters] list must be"),
        (("[device]", "device = 3\n[devices]"), "section"),
        (("[device]", "[device"), "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Any, change: tuple[str, str], says: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace(*change))
    assert says in str(caught.value)


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load(str(tmp_path / "absent.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not TOML"):
        config.load(str(tmp_path / "binary.toml"))
