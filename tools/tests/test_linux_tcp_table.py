"""Whom a machine has called, from the kernel's table of TCP connections."""

import socket
from pathlib import Path

import pytest
from stonechat.errors import CollectorError
from stonechat.linux.tcp_table import TcpContacts, calls, opened_connections

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def row(local: int, peer: str, state: str) -> str:
    address = socket.inet_aton(peer)[::-1].hex().upper()
    return (
        f"   0: 0100A8C0:{local:04X} {address}:01BB {state} 00000000:00000000 00:00000000 00000000     0        0 1\n"
    )


def table(folder: Path, *rows: str) -> None:
    (folder / "net").mkdir(exist_ok=True)
    (folder / "net/tcp").write_text(HEAD + "".join(rows))


def test_a_connection_that_was_closed_from_here_is_one_contact(tmp_path):
    contacts = TcpContacts(b"secret", str(tmp_path))
    table(tmp_path, row(40000, "198.51.100.7", "06"))
    assert len(contacts.contacts()) == 1
    assert contacts.contacts() == []  # still in TIME_WAIT: the same one
    table(tmp_path, row(40000, "198.51.100.7", "06"), row(40001, "198.51.100.7", "06"))
    assert len(contacts.contacts()) == 1


def test_one_that_stays_open_is_a_contact_each_time_and_one_to_here_is_none(tmp_path):
    contacts = TcpContacts(b"secret", str(tmp_path))
    table(
        tmp_path,
        row(22, "0.0.0.0", "0A"),
        row(22, "198.51.100.9", "01"),
        row(40000, "198.51.100.7", "01"),
        row(40000, "127.0.0.1", "01"),
    )
    first = contacts.contacts()
    assert len(first) == 1 and first == contacts.contacts()
    assert all(0 <= peer < 1 << 30 for peer in first)
    assert first != TcpContacts(b"another", str(tmp_path)).contacts()
    assert [socket.inet_ntoa(address[12:]) for address in opened_connections(9, str(tmp_path))] == [
        "198.51.100.7",
        "127.0.0.1",
    ]
    assert len(opened_connections(1, str(tmp_path))) == 1


def test_no_table_and_a_damaged_one(tmp_path):
    assert calls(str(tmp_path)) == []
    table(tmp_path, "half a row\n")
    assert calls(str(tmp_path)) == []
    table(tmp_path, "0: 0100A8C0:9C40 ZZ:01BB 01 0\n")
    with pytest.raises(CollectorError, match="is no address"):
        calls(str(tmp_path))


def test_this_machine_s_own_connection_is_found():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        accepted.close()
        port = b"%04X" % client.getsockname()[1]
        assert port in [local for _, local, _ in calls()]
