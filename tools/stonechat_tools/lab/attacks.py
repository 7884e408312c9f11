"""What malware and attackers do to a small device, acted out: bounded in time and count, and aimed only at loopback or
at the --target that is given. Use a target that is yours: a network namespace, a lab.

Without --target everything stays on loopback: addresses are drawn from 127.77.0.0/16, and the attack brings the
servers that it talks to. With --target NETWORK (10.77.0.0/16) addresses are drawn from it and `peers` serves there;
with --target HOST there is that one host. The *_in attacks are the other way round: --target is the device.

It prints one line once the attack has begun (after preparing its files), and ends by itself.

Examples:
  python -m stonechat_tools.lab.attacks --list
  python -m stonechat_tools.lab.attacks scan_connect --seconds 20
  python -m stonechat_tools.lab.attacks exfil_slow --seconds 60 --target 10.77.0.0/16
"""

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from stonechat_tools.lab import attack_acts as acts
from stonechat_tools.lab.attack_acts import Scene
from stonechat_tools.lab.bounds import leave_cleanly_on_signals, scratch_folder, started

MODULE = "stonechat_tools.lab.attacks"


@dataclass(frozen=True)
class Attack:
    """`features`: those of linux-proc-1 and linux-1 that belong to it, for judging an explanation. `loud` ones show in
    a window; `at_device` ones come from outside; `privileged` ones need root or CAP_NET_RAW."""

    act: Callable[[Scene], None]
    what: str
    features: tuple[str, ...]
    loud: bool = True
    at_device: bool = False
    privileged: bool = False


_CONNECTING = ("conn_out", "conn_fail", "conn_reset", "rst_out", "retrans", "icmp_unreach_in")
_NEW_PEERS = ("peers", "new_peers", "new_peer_bytes", "top_peer_share")
_SENDING = ("bytes_out", "pkts_out", "mean_out_size")
_ON_LOOPBACK = ("bytes_in", "pkts_in")  # what is sent on loopback arrives there as well
_SMALL_PACKETS = ("pkts_out", "pkts_in", "bytes_out", "bytes_in", "mean_out_size", "ctxt")
_SYS_NET = ("sys_rate", "sys_sock", "sys_netio")
_WRITING = ("pages_dirtied", "disk_written", "sys_fmod", "sys_write", "sys_read", "sys_open", "sys_fmeta", "cpu_busy")
_STARTING = ("forks", "pgfault", "execs", "sys_proc", "sys_open", "sys_fmeta", "sys_mem", "sys_rate", "cpu_busy")

ATTACKS: dict[str, Attack] = {
    "scan_connect": Attack(
        acts.scan_connect,
        "telnet scan by connect, 160 a second, as Mirai's relatives without root do",
        _CONNECTING + _NEW_PEERS + _SYS_NET + _SMALL_PACKETS + ("dports", "syn_out", "syn_fail", "rst_in"),
    ),
    "scan_raw": Attack(
        acts.scan_raw,
        "telnet scan by raw SYNs, 160 a second, as Mirai does",
        ("ip_out_unattrib", "dports", "syn_out", "syn_fail", "rst_in", "rst_out", "icmp_unreach_in")
        + _SMALL_PACKETS
        + _NEW_PEERS
        + _SYS_NET,
        privileged=True,
    ),
    "udp_flood": Attack(
        acts.udp_flood,
        "512-byte datagrams to random ports of one host, at most 5,000 a second",
        ("udp_out", "udp_noport", "icmp_unreach_in", "dports") + _SENDING + _ON_LOOPBACK + _NEW_PEERS + _SYS_NET,
    ),
    "exfil_burst": Attack(
        acts.exfil_burst,
        "2 MB a second to a host never seen before",
        _SENDING + _ON_LOOPBACK + _NEW_PEERS + _SYS_NET + ("estab", "conn_out"),
    ),
    "exfil_slow": Attack(
        acts.exfil_slow,
        "4 KB a second to a host never seen before",
        _SENDING + _ON_LOOPBACK + _NEW_PEERS + ("estab", "conn_out"),
    ),
    "miner": Attack(
        acts.miner,
        "SHA-256 on half of the cores, and a message to the pool every three seconds",
        ("cpu_busy", "ctxt", "estab") + _NEW_PEERS,
    ),
    "brute_in": Attack(
        acts.brute_in,
        "ten logins a second tried on the device",
        ("conn_in", "conn_out", "peers") + _SMALL_PACKETS + _SYS_NET,
        at_device=True,
    ),
    "portsweep_in": Attack(
        acts.portsweep_in,
        "a hundred of the device's ports a second tried",
        ("rst_out", "conn_fail", "conn_out", "conn_in", "rst_in", "dports") + _SMALL_PACKETS,
        at_device=True,
    ),
    "brute_out": Attack(
        acts.brute_out,
        "the device tries logins on eight others, ten a second",
        ("conn_out", "conn_in", "syn_out") + _SMALL_PACKETS + _NEW_PEERS + _SYS_NET,
    ),
    "beacon": Attack(
        acts.beacon,
        "100 bytes to a control server never seen before, every five seconds",
        _NEW_PEERS + ("conn_out", "conn_in", "syn_out"),
        loud=False,
    ),
    "forkbomb": Attack(
        acts.forkbomb,
        "forty forks a second, at most 150 alive",
        ("forks", "cpu_busy", "pgfault", "ctxt", "mem_avail", "sys_proc", "sys_mem", "sys_rate"),
    ),
    "ransom": Attack(
        acts.ransom, "encrypts files as fast as it can", _WRITING + ("disk_read", "ctxt", "pgfault", "sys_rate")
    ),
    "download_exec": Attack(
        acts.download_exec,
        "fetches 400 KB, makes it executable and runs it, every two seconds",
        _STARTING + _NEW_PEERS + ("bytes_in", "bytes_out", "pkts_in", "conn_out", "conn_in", "pages_dirtied"),
    ),
    "scan_1ps": Attack(
        acts.scan_1ps,
        "telnet scan, one connect a second",
        _CONNECTING + _NEW_PEERS + ("dports", "syn_out", "syn_fail", "rst_in"),
        loud=False,
    ),
    "exfil_400Bps": Attack(
        acts.exfil_400bps,
        "400 bytes a second to a host never seen before",
        _SENDING + _NEW_PEERS + ("estab", "conn_out"),
        loud=False,
    ),
    "exfil_via_known_peer": Attack(
        acts.exfil_via_known_peer,
        "2 KB a second to a host that the device knows",
        _SENDING + ("estab", "conn_out", "syn_out", "top_peer_share", "sent_to_peer"),
        loud=False,
    ),
    "miner_5pct": Attack(
        acts.miner_5pct, "a miner that takes a twentieth of a core", ("cpu_busy", "estab") + _NEW_PEERS, loud=False
    ),
    "brute_in_1per5s": Attack(
        acts.brute_in_1per5s,
        "one login in five seconds tried on the device",
        ("conn_in", "conn_out", "peers", "pkts_in"),
        loud=False,
        at_device=True,
    ),
    "ransom_1ps": Attack(acts.ransom_1ps, "encrypts one file a second", _WRITING, loud=False),
    "beacon_60s_known": Attack(
        acts.beacon_60s_known,
        "100 bytes to a host that the device knows, once a minute",
        ("conn_out", "syn_out"),
        loud=False,
    ),
    "shell_recon": Attack(
        acts.shell_recon, "somebody looks around in a shell", _STARTING + ("sys_read", "sys_write", "ctxt"), loud=False
    ),
}


def run(name: str, seconds: float, target: str | None = None, *, folder: str | None = None, seed: int = 3) -> None:
    """Act out one attack for `seconds`; `folder` is where it may make one of its own for its files."""
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder(folder))
        ATTACKS[name].act(Scene(seconds, target, scratch, seed, stack))


def command(
    name: str, seconds: float, target: str | None = None, *, folder: str | None = None, seed: int = 3
) -> list[str]:
    """What starts an attack as a process of its own; it prints a line once it has begun."""
    words = [sys.executable, "-m", MODULE, name, "--seconds", str(seconds), "--seed", str(seed)]
    return words + (["--target", target] if target else []) + (["--folder", folder] if folder else [])


def spawn(
    name: str,
    seconds: float,
    target: str | None = None,
    *,
    folder: str | None = None,
    seed: int = 3,
    prefix: tuple[str, ...] = (),
) -> "subprocess.Popen[str]":
    """An attack as a process of its own that has begun; `prefix` is a command to run it under. Raises OSError when it
    could not begin (no capability, nobody at the target)."""
    return started([*prefix, *command(name, seconds, target, folder=folder, seed=seed)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=ATTACKS, metavar="NAME", help="which attack")
    parser.add_argument("--list", action="store_true", help="show the attacks and the features that belong to each")
    parser.add_argument("--json", action="store_true", help="the list for machines")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long (default 20)")
    parser.add_argument("--target", metavar="HOST|NETWORK", help="whom (default: loopback only)")
    parser.add_argument("--folder", metavar="DIR", help="where its own temporary folder may go")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    if args.list or not args.name:
        _print_list(args.json)
        return 0
    leave_cleanly_on_signals()
    try:
        run(args.name, args.seconds, args.target, folder=args.folder, seed=args.seed)
    except OSError as error:
        print(f"{args.name}: {error}", file=sys.stderr)
        return 1
    return 0


def _print_list(as_json: bool) -> None:
    if as_json:
        rows = [
            {"name": name, "what": a.what, "features": a.features, "loud": a.loud, "at_device": a.at_device}
            for name, a in ATTACKS.items()
        ]
        print(json.dumps(rows, indent=2))
        return
    for name, attack in ATTACKS.items():
        print(f"{name:<22}{attack.what}\n{'':<22}  {', '.join(attack.features)}")


if __name__ == "__main__":
    raise SystemExit(main())
