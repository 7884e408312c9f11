"""`stonechat-agent`: the agent as a Linux service. Reads one TOML file, attaches, gives up its privileges, watches.

    stonechat-agent --config /etc/stonechat/stonechat.toml
    stonechat-agent --example-config > stonechat.toml
    stonechat-agent --config stonechat.toml --check      # read everything, say what would run, start nothing
    stonechat-agent --config /etc/stonechat/stonechat.toml --announce-sleep 3600   # before the machine is suspended
    stonechat-agent install --bundle sensor-7.tar        # as root: user, files and systemd unit; `uninstall` undoes it

Exit status: 0 stopped by a signal; 1 it can't run before somebody changes something (the message says what and how);
2 wrong usage; 70 an error that nothing foresaw; 75 it may run later: another instance runs, or the system refused.
"""

import argparse
import marshal
import os
import resource
import signal
import sys

from .. import __version__, model_file
from ..errors import ModelError, StonechatError
from . import config as configuration
from .daemon import Daemon
from .files import read_file
from .log import Log
from .planned_sleep import announce
from .process import EXIT_CONFIG, EXIT_UNFORESEEN, describe, exit_status, keep_standard_files


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stonechat-agent", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="the configuration, TOML")
    parser.add_argument("--check", action="store_true", help="read and attach everything, say what would run, and stop")
    parser.add_argument("--example-config", action="store_true", help="print a configuration with every key explained")
    parser.add_argument(
        "--announce-sleep",
        type=int,
        metavar="SECONDS",
        help="let the running agent announce that the device sleeps now, and for how long; returns once the broker"
        " has it",
    )
    parser.add_argument("--version", action="version", version="stonechat-agent " + __version__)
    return parser


def parse(argv: list | None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.config and not args.example_config:
        parser.error("--config FILE is missing (--example-config prints one to start from)")
    return args


def prove_models(config: dict) -> None:
    """Check that the plans of the models agree with their graphs; here, because it then costs the resident process no
    memory. Raises ConfigError, ModelError."""
    for what, path in (("[model] file", config["model"]["file"]), ("[counters] model", config["counters"]["model"])):
        if path:
            try:
                model_file.prove(read_file(path, what))
            except ModelError as error:
                raise ModelError("%s %s: %s" % (what, path, error))


def become_service(config: dict) -> None:
    """Replace this program by daemon.main in the same process; an anonymous file passes the configuration
    on; no other open file is inherited. Raises OSError."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                continue  # the folder's own, closed by now
    handed_fd = os.memfd_create("stonechat-config", 0)  # 0: it stays open
    os.write(handed_fd, marshal.dumps(config))
    os.lseek(handed_fd, 0, os.SEEK_SET)
    flags = ["-I"] if sys.flags.isolated else ["-P"]  # never a module from the folder that we happen to be in
    code = "from stonechat.linux.daemon import main; raise SystemExit(main(%d))" % handed_fd
    os.execv(sys.executable, [sys.executable, *flags, "-c", code])


def forbid_core_dumps() -> None:
    """A core dump would hold the device's key. A limit of 1 byte also keeps a core_pattern that is a pipe from getting
    one; 0 does not (core(5)). The daemon inherits it."""
    for limit in (1, 0):
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
            return
        except (ValueError, OSError):
            continue


def main(argv: list | None = None) -> int:
    keep_standard_files()
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("install", "uninstall"):
        from . import install

        return install.main(argv)
    args = parse(argv)
    if args.example_config:
        sys.stdout.write(configuration.example())
        return 0
    log = Log("error")
    forbid_core_dumps()
    if not (os.isatty(0) or os.isatty(2)):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the daemon reads its files later than whoever sends it
    try:
        config = configuration.load(args.config)
        if args.announce_sleep is not None:
            announce(config["device"]["state_file"], args.announce_sleep)
            return 0
        prove_models(config)
        if args.check:
            print(Daemon(config, Log(config["log"]["level"]), check=True).plan())
        else:
            if config["response"]["mode"] != "on":  # here: what it takes is gone with this program
                from .netfilter import clear_before_a_start

                clear_before_a_start()
            become_service(config)
    except (StonechatError, OSError) as error:
        log("error", str(error))
        return EXIT_CONFIG if args.check else exit_status(error)
    except Exception as error:  # noqa: BLE001 - one line
        log("error", describe(error))
        return EXIT_UNFORESEEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
