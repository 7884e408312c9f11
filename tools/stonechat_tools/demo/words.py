"""The features of the demo's devices in plain words, for a reader who has never seen a schema."""

WORDS = {
    # micropython-1
    "sockets": "sockets opened",
    "conn_refused": "refused connections",
    "conn_unanswered": "unanswered connections",
    "conn_mute": "silent connections",
    "listens": "new services",
    "lookups": "name look-ups",
    "lookup_fail": "failed name look-ups",
    "reads": "network reads",
    "writes": "network writes",
    "mean_write": "size of a write",
    "opens": "files opened",
    "opens_write": "files opened to write",
    "heap_free": "free memory",
    "loop_lag": "slow main loop",
    # linux-proc-1 and linux-1
    "conn_out": "connections",
    "conn_in": "visitors",
    "conn_fail": "failed connections",
    "conn_reset": "reset connections",
    "rst_out": "resets sent",
    "rst_in": "resets received",
    "retrans": "packets sent again",
    "udp_in": "datagrams received",
    "udp_out": "datagrams sent",
    "udp_noport": "datagrams to closed ports",
    "icmp_unreach_in": "unreachable hosts",
    "ip_out_unattrib": "raw packets",
    "estab": "open connections",
    "listen_ports": "open ports",
    "bytes_in": "bytes received",
    "bytes_out": "bytes sent",
    "pkts_in": "packets received",
    "pkts_out": "packets sent",
    "mean_out_size": "size of a packet",
    "cpu_busy": "processor load",
    "ctxt": "task switches",
    "forks": "processes started",
    "mem_avail": "free memory",
    "pgfault": "memory pages touched",
    "pages_dirtied": "pages written",
    "disk_read": "disk reads",
    "disk_written": "disk writes",
    "sys_rate": "system calls",
    "sys_open": "files opened",
    "sys_read": "file reads",
    "sys_write": "file writes",
    "sys_fmeta": "files looked up",
    "sys_fmod": "files changed",
    "sys_sock": "sockets opened",
    "sys_netio": "network calls",
    "sys_proc": "process calls",
    "sys_mem": "memory calls",
    "sys_priv": "privileged calls",
    "sys_entropy": "mix of system calls",
    "execs": "programs started",
    "syn_out": "connection attempts",
    "syn_fail": "failed attempts",
    "peers": "hosts",
    "new_peers": "new hosts",
    "new_peer_bytes": "bytes to new hosts",
    "dports": "ports tried",
    "top_peer_share": "main host",
    "login_fail": "failed logins",
}


def plain(features: list[str], width: int) -> str:
    """The features in words, as many as fit into `width` characters, at least the first."""
    text = ""
    for name in features:
        word = WORDS.get(name, name)
        if word in text:
            continue
        longer = f"{text}, {word}" if text else word
        if text and len(longer) > width:
            break
        text = longer
    return text
