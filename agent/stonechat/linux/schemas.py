"""The Linux schemas. Each column is (name, unit, kind); features.py says what the kinds mean.

LINUX_PROC_1 is what any process may read. Rates of packets and connections come from the kernel's own counters, so a
connection that lives a microsecond counts too.
"""

from ..features import LEVEL, RATE, SHARE
from ..schema import Schema
from .syscall_classes import CLASSES

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
    ("icmp_unreach_in", "messages/s", RATE),  # a host or router answered "nobody here"
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

# With BPF the system calls and peers themselves replace these approximations.
STAND_INS = ("conn_out", "conn_fail", "retrans", "udp_in", "udp_out", "ctxt", "pgfault", "pages_dirtied", "disk_read")

SYSCALL_COLUMNS = (
    ("sys_rate", "calls/s", RATE),
    ("sys_open", "calls/s", RATE),
    ("sys_read", "calls/s", RATE),
    ("sys_write", "calls/s", RATE),
    ("sys_fmeta", "calls/s", RATE),  # stat, readdir, lseek: looking around
    ("sys_fmod", "calls/s", RATE),  # rename, unlink, chmod, fsync: changing what is there
    ("sys_sock", "calls/s", RATE),
    ("sys_netio", "calls/s", RATE),
    ("sys_proc", "calls/s", RATE),
    ("sys_mem", "calls/s", RATE),
    ("sys_priv", "calls/s", RATE),  # setuid, ptrace, mount, modules, io_uring
    ("sys_entropy", "%", SHARE),  # how evenly the calls spread over all 16 classes
    ("execs", "programs/s", RATE),
)

CONNECTION_COLUMNS = (
    ("syn_out", "segments/s", RATE),  # also those of raw sockets, and retransmissions
    ("syn_fail", "%", SHARE),  # of these, without an answer that accepts
    ("rst_in", "segments/s", RATE),
    ("peers", "peers", LEVEL),
    ("new_peers", "peers/s", RATE),  # not among those that the device has learned
    ("new_peer_bytes", "B/s", RATE),  # sent to them
    ("dports", "ports", LEVEL),  # distinct ones that a SYN or a datagram went to
    ("top_peer_share", "%", SHARE),  # of the bytes sent
)

LOGIN_COLUMNS = (("login_fail", "attempts/s", RATE),)

# One service (a cgroup): every class of system calls by itself, which few columns of a small model can afford.
SERVICE_COLUMNS = (
    *[("sys_" + name, "calls/s", RATE) for name in CLASSES],
    ("execs", "programs/s", RATE),
    ("forks", "tasks/s", RATE),
    ("syn_out", "segments/s", RATE),  # connections opened; not those on loopback
    ("accepted", "conn/s", RATE),
    ("rst_in", "segments/s", RATE),
    ("bytes_out", "B/s", RATE),
    ("bytes_in", "B/s", RATE),
    ("cpu_time", "ms/s", RATE),
)

LINUX_SERVICE_1 = Schema("linux-service-1", SERVICE_COLUMNS)

LINUX_1 = Schema(
    "linux-1",
    tuple(column for column in PROC_COLUMNS if column[0] not in STAND_INS)
    + SYSCALL_COLUMNS
    + CONNECTION_COLUMNS
    + LOGIN_COLUMNS,
)
