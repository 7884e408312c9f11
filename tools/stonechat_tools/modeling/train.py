"""Train an autoencoder on recordings and make the .tflite with its card: one command.

Writes model.tflite, golden.json and card.md into the output folder. Attack windows in the recordings are left out. With
--each every file is a device class with a model of its own, trained in --jobs processes; finished classes are skipped
when the command is run again.

Examples:
  stonechat train recordings/*.csv.gz -o my-model/
  stonechat train --recipe models/linux-proc-1/recipe.toml
  stonechat train --recipe models/linux-proc-1/recipe.toml --record
  stonechat train --each classes/*.csv.gz -o models-by-class/ --jobs 8
  stonechat train --each classes/*.csv.gz -o models-by-class/ --engine dask --address tcp://10.0.0.5:8786
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from ..console import safe, say
from .options import LEAST_WINDOWS, WINDOWS_A_LEARNED_ONE
from .task import Task, make


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recordings", nargs="*", help=f"traces of one device class, {LEAST_WINDOWS} benign windows at least")
    add("-o", "--output", metavar="DIR", help="where the model goes (default with --recipe: beside the recipe)")
    add("--name", help="name of the model (default: that of the output folder)")
    add("--model-version", type=int, default=1, metavar="N", help="version in the file; devices take only higher ones")
    add("--recipe", metavar="TOML", help="how a reference model is made")
    add("--record", action="store_true", help="first record what the recipe's simulated devices lack (needs root)")
    add("--seeds", type=int, help="how many draws are tried (default 5)")
    add("--units", type=int, help="latents in the bottleneck (default: several are tried)")
    add("--network", help="linear (default) or what modeling/fit.py knows besides")
    add(
        "--learn-windows",
        type=int,
        help="what a fresh device learns before it may alarm (default 128); each device's recording must have "
        f"{WINDOWS_A_LEARNED_ONE} windows for each",
    )
    add("--trim", type=float, help="share of 20-window blocks to leave out as contaminated (default 0)")
    add("--jitter-octaves", type=float, help="noise on counts and levels while fitting (default 0)")
    add("--jitter-percent", type=float, help="noise on shares while fitting (default 0)")
    add("--budget", help="false alarms allowed, as 1/30d (the default)")
    add(
        "--backend",
        choices=("numpy", "keras"),
        help="keras: train and convert with TensorFlow (pip install stonechat[keras])",
    )
    add(
        "--forbid-own-model",
        dest="own_model",
        action="store_false",
        default=None,
        help="no device may train a model of its own beside this one",
    )
    add("--weights", metavar="NPZ", help="also write the float weights, as `stonechat quantize` takes them")
    add("--each", action="store_true", help="every recording is a class of its own: OUTPUT/NAME/model.tflite")
    add("--jobs", type=int, default=1, metavar="N", help="with --each: processes at a time")
    add("--engine", choices=("local", "dask"), default="local", help="dask: on a cluster (pip install stonechat[dask])")
    add("--address", help="with --engine dask: its scheduler (default: a cluster on this machine)")
    add("--json", action="store_true", help="print the outcome as JSON, and no progress")


def run(args: argparse.Namespace) -> int:
    from .classes import train_classes

    if args.each:
        if args.recipe or args.record or not args.output or not args.recordings:
            raise ConfigError("--each takes recordings and --output, and no recipe")
        outcomes = train_classes(_class_tasks(args), args.jobs, args.engine, args.address, _classes_view(args))
        failed = [outcome for outcome in outcomes if "error" in outcome]
        if args.json:
            print(json.dumps(outcomes))
        else:
            for outcome in failed:
                say(f"{outcome['name']}: {outcome['error']}", sys.stderr)
            say(f"{len(outcomes) - len(failed)} models in {args.output}, {len(failed)} failed")
        return 1 if failed else 0
    with _one_view(args) as show:
        outcome = make(_task(args, show), show)
    say(json.dumps(outcome) if args.json else _sentence(outcome))
    return 0


def _sentence(outcome: dict[str, Any]) -> str:
    return (
        f"{outcome['model']}: {outcome['file_bytes']} bytes, {outcome['macs']} MACs, bottleneck {outcome['units']}, "
        f"from {outcome['windows']} windows of {outcome['schema']}; {outcome['held_out_alarms']} alarms in "
        f"{outcome['held_out_windows']} held-out windows"
    )


# ----------------------------------------------------------------------------------------------------- what to make


def _task(args: argparse.Namespace, show: Callable[[str, float], None]) -> Task:
    if args.recipe:
        return _recipe_task(args, show)
    if not args.recordings or not args.output:
        raise ConfigError("give recordings and --output, or --recipe")
    if args.record:
        raise ConfigError("--record needs a --recipe that says what to record")
    name = args.name or Path(args.output).resolve().name
    return Task(
        args.recordings, args.output, name, args.model_version, _options(args, {}), _command(), weights=args.weights
    )


def _recipe_task(args: argparse.Namespace, show: Callable[[str, float], None]) -> Task:
    from ..recording.recipe import read_recipe

    recipe = read_recipe(args.recipe)
    if args.record:
        from ..recording.session import record

        record(recipe, lambda done, total: show(f"recording, {done} of {total} windows", 0.0))
    recordings = args.recordings or recipe.traces()
    if not recordings:
        raise ConfigError(f"no recordings in {recipe.recordings}: make them with --record, or put traces there")
    output = args.output or str(recipe.folder)
    options = _options(args, recipe.fit)
    command = f"stonechat train --recipe {args.recipe}" + (" --record" if recipe.record else "")
    return Task(
        recordings, output, recipe.name, recipe.version, options, command, recipe.summary, recipe.limits, args.weights
    )


def _options(args: argparse.Namespace, table: dict[str, Any]) -> Any:
    """The recipe's [fit], overridden by what the command line gives."""
    from .options import Options

    given = {key: getattr(args, key) for key in Options.__dataclass_fields__ if getattr(args, key, None) is not None}
    return Options.of({**table, **given}, args.recipe or "stonechat train")


def _command() -> str:
    return "stonechat " + shlex.join(sys.argv[1:])


def _class_tasks(args: argparse.Namespace) -> list[Task]:
    options = _options(args, {})
    tasks = []
    for path in args.recordings:
        name = Path(path).name.split(".")[0]
        output = os.path.join(args.output, name)
        tasks.append(Task([path], output, name, args.model_version, options, f"stonechat train {path} -o {output}"))
    if len({task.name for task in tasks}) != len(tasks):
        raise ConfigError("--each: two recordings have the same name; the class is named after the file")
    return tasks


# -------------------------------------------------------------------------------------------------------------- views


@contextmanager
def _one_view(args: argparse.Namespace) -> Iterator[Callable[[str, float], None]]:
    if args.json or not sys.stderr.isatty():
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeElapsedColumn

    from ..screen import Description

    columns = (BarColumn(), Description(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=1.0)
        yield lambda what, share: progress.update(task, description=what, completed=share)


def _classes_view(args: argparse.Namespace) -> Callable[[int], Any]:
    """-> a context manager over the number of tasks that gives a callable for each finished one."""

    @contextmanager
    def view(total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        if args.json or not sys.stderr.isatty():
            yield lambda outcome: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=total)

            def done(outcome: dict[str, Any]) -> None:
                progress.update(
                    task, advance=1, description=safe(outcome["name"]) + (" failed" if "error" in outcome else "")
                )

            yield done

    return view
