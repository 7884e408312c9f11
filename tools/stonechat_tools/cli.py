"""`stonechat`: the verbs. Each is a module with HELP, add_arguments(parser) and run(args), imported when called."""

import argparse
import contextlib
import difflib
import importlib
import io
import os
import shutil
import sys
import textwrap
from typing import NoReturn

from stonechat import __version__
from stonechat.errors import StonechatError

from stonechat_tools import console

# verb: (module, one line of help); the order is that of `stonechat --help`
VERBS = {
    "demo": ("stonechat_tools.demo", "watch agents learn two simulated devices, then catch attacks on them"),
    "record": ("stonechat_tools.recording.record", "record a device's windows into a trace"),
    "dataset": ("stonechat_tools.traces.dataset", "import, join, label and split traces"),
    "train": ("stonechat_tools.modeling.train", "train an autoencoder and make the .tflite with its card"),
    "quantize": ("stonechat_tools.modeling.quantize", "turn a trained float model into an int8 .tflite"),
    "calibrate": (
        "stonechat_tools.modeling.calibrate",
        "set a model's alarm constants for a false-alarm budget",
    ),
    "evaluate": ("stonechat_tools.evaluation.evaluate", "measure a model, or the whole suite, on recordings"),
    "trial": ("stonechat_tools.evaluation.trial", "attack simulated devices, live, and count windows to the alarm"),
    "inspect": ("stonechat_tools.modeling.inspect", "show what is in a .tflite and what it costs on a board"),
    "collect": ("stonechat_tools.fleet.collect", "subscribe to the fleet's reports and store them"),
    "report": ("stonechat_tools.fleet.history", "show a device's history as a table or a plot"),
    "fleet": ("stonechat_tools.fleet.manage", "name, group and remove devices; see and handle incidents"),
    "dashboard": ("stonechat_tools.dashboard.dashboard", "show the fleet in a browser"),
    "home-assistant": ("stonechat_tools.dashboard.home_assistant", "show the fleet in Home Assistant"),
    "export": ("stonechat_tools.fleet.export", "write the stored reports as CSV, JSON lines, Parquet or SenML"),
    "command": ("stonechat_tools.fleet.command", "send a device an authenticated command"),
    "operator": ("stonechat_tools.fleet.operator", "sign the commands that a dashboard or home automation asks for"),
    "provision": ("stonechat_tools.fleet.provision", "make, rotate and revoke device identities"),
    "release": ("stonechat_tools.release.release", "sign models for a class of devices, and roll them out in stages"),
    "broker-config": ("stonechat_tools.fleet.broker_config", "write a mosquitto configuration for the fleet"),
    "simulate": ("stonechat_tools.simulate.simulate", "run a simulated fleet of real agents, some of them attacked"),
    "doctor": (
        "stonechat_tools.device.doctor",
        "say which feature sources work here, and the fix for the others",
    ),
    "top": ("stonechat_tools.device.top", "live features, z-scores and verdict in the terminal"),
    "build": ("stonechat_tools.device.build", "make the .mpy files, package.json and manifest.py for boards"),
    "deploy": ("stonechat_tools.device.deploy", "copy the agent and a model to a MicroPython board"),
    "bench": ("stonechat_tools.bench.bench", "measure, side by side with the peers that are installed"),
    "soak": ("stonechat_tools.proofs.soak", "the long jobs: fuzzing, power cuts, packet ids"),
}

# verb: what the verbs from it on are for, in `stonechat --help`
GROUPS = {
    "demo": "try it",
    "record": "make a model",
    "collect": "run a fleet",
    "doctor": "look at a device, fill a board",
    "bench": "measure and prove",
}

_LONGEST_LINE = 300


def _line(text: str, longest: int) -> str:
    line = " ".join(text.split())
    return console.printable(line if len(line) <= longest else line[:longest] + " ...")


class Parser(argparse.ArgumentParser):
    """Wrong arguments cost one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_line(message, _LONGEST_LINE)} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """-> the exit status: 0; 1 for an error (one line on stderr); 130, 143 or 129 for ^C, SIGTERM or SIGHUP."""
    if argv is None:
        console.keep_standard_files()
    with console.ended_by_signals():
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a file's name that is not UTF-8 can be printed, too
                stream.reconfigure(errors="backslashreplace")
        try:
            status = _run(sys.argv[1:] if argv is None else argv, argv is None)
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # the reader has seen enough; nothing more can be printed, at the exit neither
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except console.Ended as ended:
            return 128 + ended.number
        except KeyboardInterrupt:
            return 130


def _overview() -> str:
    """The verbs with their lines, in groups, as wide as the terminal."""
    width = max(shutil.get_terminal_size().columns - 2, 40)
    lines = []
    for verb, (_, help_line) in VERBS.items():
        if verb in GROUPS:
            lines += ["", GROUPS[verb] + ":"]
        lines += textwrap.wrap(
            help_line, width, initial_indent=f"  {verb:<16}", subsequent_indent=" " * 18, break_on_hyphens=False
        )
    return "\n".join(lines)


def _run(argv: list[str], own_process: bool) -> int:
    """own_process: not called by a program that goes on afterwards."""
    parser = Parser(
        prog="stonechat",
        description="Anomaly detection on the device itself: build models, collect reports,\nlook at the fleet.\n"
        + _overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version="stonechat " + __version__)
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, help="one of those above; `stonechat VERB --help` has its examples"
    )
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        like = difflib.get_close_matches(argv[0], VERBS, 1)
        parser.error(f"no such verb: {argv[0]!r}" + (f"; do you mean {like[0]}?" if like else ""))
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for verb, (module, _) in VERBS.items():
        sub = verbs.add_parser(verb, formatter_class=argparse.RawDescriptionHelpFormatter)
        if verb == chosen:  # only the verb that was called is imported
            try:
                room = importlib.import_module(module)
                room.add_arguments(sub)
            except ModuleNotFoundError as error:
                return _not_installed(verb, error)
            sub.description = room.__doc__
    args, rest = parser.parse_known_args(argv)
    if rest:  # the verb's own help has its options
        verbs.choices[args.verb].error("unrecognized arguments: " + " ".join(rest))
    if any("\0" in word for word in argv):
        return _failed(args.verb, "an argument has a NUL in it")
    try:
        verb_module = importlib.import_module(VERBS[args.verb][0])
        if own_process and getattr(verb_module, "HOLDS_KEYS", False):
            console.protect_process()
        return int(verb_module.run(args) or 0)
    except ModuleNotFoundError as error:
        return _not_installed(args.verb, error)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _failed(args.verb, console.os_error(error))
    except StonechatError as error:
        return _failed(args.verb, str(error))
    except Exception as error:
        if os.environ.get("STONECHAT_TRACEBACK"):
            raise
        what = f"unexpected {type(error).__name__}: {error}"
        return _failed(args.verb, f"{what} (a fault of stonechat's: STONECHAT_TRACEBACK=1 shows where)")


def _failed(verb: str, text: str) -> int:
    with contextlib.suppress(OSError):  # the terminal is gone
        print(f"stonechat {verb}: {_line(text, 4 * _LONGEST_LINE)}", file=sys.stderr)
    return 1


def _not_installed(verb: str, error: ModuleNotFoundError) -> int:
    line = console.needs(error)
    if line is None:
        raise error
    return _failed(verb, line)


if __name__ == "__main__":
    sys.exit(main())
