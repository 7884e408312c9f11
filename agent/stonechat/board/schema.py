"""The schema of a MicroPython board: what the firmware itself did through socket, asyncio, ssl, open and getaddrinfo.

Not visible from here: packets to closed ports and what the network stack drops, traffic of C code (ESP-NOW,
BLE, the Wi-Fi driver, NTP inside the port), sockets made before the hook, `io.open`, os.remove and its like, memory of
C code. Code in the same interpreter can undo the hook: this is telemetry, not a sandbox. The agent's own traffic and
files are left out. Uptime, reset cause and RSSI are facts of the board, not features: they are constant, or
of the surroundings. A board itself needs only kinds and id of it (hooks.Columns).
"""

from ..features import LEVEL, RATE, SHARE
from ..schema import Schema

COLUMNS = (
    ("sockets", "sockets/s", RATE),  # made by socket(); those that accept() makes count in conn_in
    ("conn_out", "conn/s", RATE),  # connect(): TCP, and UDP sockets that choose one peer
    ("conn_refused", "errors/s", RATE),  # nobody listens there, or the peer reset; lwIP calls both a reset
    ("conn_unanswered", "errors/s", RATE),  # timed out or unreachable, in connect or when waiting for an answer
    ("conn_mute", "conn/s", RATE),  # connected out and closed without one byte received: what a scan leaves
    ("conn_in", "conn/s", RATE),  # accept()
    ("listens", "calls/s", RATE),  # listen(): a new service
    ("lookups", "names/s", RATE),  # getaddrinfo(), also of plain addresses
    ("lookup_fail", "names/s", RATE),
    ("peers", "peers", LEVEL),  # distinct addresses connected or sent to; 64 at most
    ("new_peers", "peers/s", RATE),  # of these, not among those that the device has learned
    ("new_peer_bytes", "B/s", RATE),  # sent to them
    ("dports", "ports", LEVEL),  # distinct ports connected or sent to; 64 at most
    ("bytes_in", "B/s", RATE),  # as the socket gives them: under TLS, the ciphertext
    ("bytes_out", "B/s", RATE),
    ("reads", "calls/s", RATE),  # that brought something
    ("writes", "calls/s", RATE),  # that took something
    ("mean_write", "B", LEVEL),  # bytes of a write
    ("udp_out", "datagrams/s", RATE),  # sendto()
    ("opens", "files/s", RATE),  # open(), also in vain
    ("opens_write", "files/s", RATE),  # of these, for writing
    ("heap_free", "%", SHARE),
    ("loop_lag", "ms", LEVEL),  # the longest time between two ticks of the agent
)

MICROPYTHON_1 = Schema("micropython-1", COLUMNS)
