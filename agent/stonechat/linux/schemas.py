"""The Linux schemas. Each column is (name, unit, kind); features.py says what the kinds mean.

LINUX_PROC_1 is what any process may read. Rates of packets and connections come from the kernel's own counters, so a
connection that lives a microsecond counts too.
"""

from ..features import LEVEL, RATE, SHARE, Schema

PROC_COLUMNS = (
    ("conn_out", "conn/s", RATE),  # TCP connections opened from here
    ("conn_in", "conn/s", RATE),  # TCP connections accepted here
    ("conn_fail", "conn/s", RATE),  # attempts that came to nothing: refused, timed out, half-open ones dropped
    ("conn_reset", "conn/s", RATE),  # established connections that ended in a reset
    ("rst_out", "segments/s", RATE),  # resets sent: what a port sweep against this device causes
    ("retrans", "segments/s", RATE),  # segments sent again: peers that do not answer
    ("udp_in", "datagrams/s", RATE),
    ("udp_out", "datagrams/s", RATE),
    ("udp_noport", "datagrams/s", RATE),  # arrived for a port that nobody listens on
    ("icmp_unreach_in", "messages/s", RATE),  # somebody out there told us "nobody here"
    ("ip_out_unattrib", "packets/s", RATE),  # sent by raw sockets: below TCP, UDP and ICMP
    ("estab", "sockets", LEVEL),
    ("listen_ports", "ports", LEVEL),
    ("bytes_in", "B/s", RATE),
    ("bytes_out", "B/s", RATE),
    ("pkts_in", "packets/s", RATE),
    ("pkts_out", "packets/s", RATE),
    ("mean_out_size", "B", LEVEL),  # bytes of a packet sent
    ("cpu_busy", "%", SHARE),
    ("ctxt", "switches/s", RATE),
    ("forks", "tasks/s", RATE),
    ("mem_avail", "%", SHARE),
    ("pgfault", "faults/s", RATE),  # every started program makes hundreds
    ("pages_dirtied", "pages/s", RATE),  # written by programs, at once
    ("disk_read", "KiB/s", RATE),
    ("disk_written", "KiB/s", RATE),  # written to the medium, at write-back
)

LINUX_PROC_1 = Schema("linux-proc-1", PROC_COLUMNS)
