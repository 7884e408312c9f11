"""Registry of the schemas that stonechat ships, by id: what a trace, a model or a status names is found here."""

from types import ModuleType

from stonechat.board import schema as board
from stonechat.features import LEVEL, RATE, SHARE
from stonechat.linux import schemas as linux
from stonechat.schema import Schema

# What a network capture shows of a device (traces/importers); no collector of the agent has it.
NETWORK_1 = Schema(
    "network-1",
    (
        ("conn_out", "connections", RATE),
        ("conn_in", "connections", RATE),
        ("conn_failed", "connections", RATE),
        ("udp_flows", "flows", RATE),
        ("icmp_flows", "flows", RATE),
        ("bytes_out", "B", RATE),
        ("bytes_in", "B", RATE),
        ("pkts_out", "packets", RATE),
        ("pkts_in", "packets", RATE),
        ("peers", "hosts", LEVEL),
        ("new_peers", "hosts", LEVEL),
        ("dports", "ports", LEVEL),
        ("mean_out", "B/packet", LEVEL),
        ("top_peer", "%", SHARE),
    ),
)


def _of(module: ModuleType) -> list[Schema]:
    return [value for value in vars(module).values() if isinstance(value, Schema)]


SCHEMAS: dict[bytes, Schema] = {schema.id: schema for schema in [*_of(linux), *_of(board), NETWORK_1]}


def by_name(name: str) -> Schema | None:
    """The shipped schema of this name, or None."""
    return next((schema for schema in SCHEMAS.values() if schema.name == name), None)
