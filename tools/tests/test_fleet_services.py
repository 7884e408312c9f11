"""The fleet's topics against the rules of services that others run."""

from pathlib import Path
from typing import Any

import pytest
from stonechat.errors import ConfigError
from stonechat.linux import config
from stonechat_tools import cli
from stonechat_tools.fleet import broker_lists, services

DOCS = Path(__file__).resolve().parents[2] / "docs" / "managed-brokers.md"


@pytest.mark.parametrize("name", [name for name, service in services.SERVICES.items() if not service.refused])
def test_default_topics_fit_with_the_longest_names(name: str) -> None:
    services.check_topics(name, "stonechat/1", "f" * 64)


@pytest.mark.parametrize(
    ("name", "prefix", "fleet", "fix"),
    [
        ("aws-iot-core", "a/b/c/d/e", "west", "leave out 1"),
        ("aws-iot-core", "/".join("abcdefgh"), "west", "leave out 4"),
        ("aws-iot-core", "p" * 128, "f" * 64, "shorten"),
        ("aws-iot-core", "ü" * 64, "f" * 60, "shorten"),
        ("aws-iot-core", "$aws/rules/x", "west", "begin with"),
        ("emqx", "/".join("a" * 125), "west", "levels"),
        ("hivemq", "$SYS/x", "west", "begin with"),
        ("azure-iot-hub", "stonechat/1", "fleet", "Event Grid"),
    ],
)
def test_what_a_service_would_refuse_is_refused_before_anything_is_made(
    name: str, prefix: str, fleet: str, fix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=fix):
        services.check_topics(name, prefix, fleet)
    words = ["provision", "--dir", str(tmp_path / "f"), "init", "--broker", "b:8883", "--auth", "managed"]
    assert cli.main([*words, "--service", name, "--prefix", prefix, "--fleet", fleet]) != 0
    assert fix in capsys.readouterr().err and not (tmp_path / "f").exists()


def test_the_kinds_are_those_that_both_ends_use() -> None:
    """Every topic of the broker's access list is checked, and so is all that agent and collector name."""
    granted = {line.split("/", 1)[1] for line in broker_lists.acl("X/", True).splitlines() if " X/" in line}
    kinds = {kind.partition("/")[2] if kind.startswith(("%u/", "+/")) else kind for kind in granted}
    named = {kind for each in kinds for kind in ([each] if each != "ha/+" else services.TOPICS)}
    assert named == set(services.KINDS)


@pytest.mark.parametrize("name", list(services.SERVICES))
def test_each_service_has_an_example_that_works(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of the page, done: the device's configuration is one that the agent takes."""
    text = DOCS.read_text()
    assert f"--service {name}" in text or services.SERVICES[name].refused
    for block in text.split("```console\n")[1:]:
        for line in block.split("```")[0].replace("\\\n", " ").splitlines():
            words = line.removeprefix("$ ").split()
            if words[:2] != ["stonechat", "provision"] or name not in line:
                continue
            assert cli.main(["provision", "--dir", str(tmp_path / "f"), *words[2:]]) == 0
            assert cli.main(["provision", "--dir", str(tmp_path / "f"), "add", "pump-1"]) == 0
            loaded: dict[str, Any] = config.load(str(tmp_path / "f/devices/pump-1/stonechat.toml"))
            topic = f"{loaded['mqtt']['prefix']}/{loaded['device']['fleet']}/pump-1/report"
            services.check_topic(name, topic)
            capsys.readouterr()
            return
    assert services.SERVICES[name].refused
