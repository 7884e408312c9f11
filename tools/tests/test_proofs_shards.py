"""Two brokers, two collectors, one PostgreSQL, in short: `stonechat soak shards` is the whole of it."""

import pytest
from stonechat_tools.fleet.shards import Shard, owner
from stonechat_tools.proofs import shards


def test_shards_take_each_device_once_and_move_few() -> None:
    names = [f"device-{n}" for n in range(3000)]
    for of in (1, 2, 3, 7):
        parts = [Shard(f"{n}/{of}") for n in range(1, of + 1)]
        assert all(sum(name in part for part in parts) == 1 for name in names)
        sizes = [sum(name in part for name in names) for part in parts]
        assert min(sizes) > 3000 / of * 0.8
    moved = sum(owner(name, 3) != owner(name, 4) for name in names)
    assert 0.2 * 3000 < moved < 0.3 * 3000  # only those that the fourth takes


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "1/5000", " 1/2"])
def test_a_shard_that_is_none_is_named(text: str) -> None:
    from stonechat.errors import ConfigError

    with pytest.raises(ConfigError, match="--shard"):
        Shard(text)


@pytest.mark.slow(12)
@pytest.mark.skipif(bool(shards.what_is_missing()), reason=shards.what_is_missing())
def test_a_killed_broker_and_collector_cost_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SUPERVISOR_S", 2.0)
    monkeypatch.setattr(shards, "BACK_S", 20.0)  # of a busy machine
    figures, wrong = shards.prove(devices=20, reports=30)
    assert not wrong, wrong
    assert figures["reports"] == 600 and 0 < figures["moved"] < 20 and min(figures["shards"]) > 0
