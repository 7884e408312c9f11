"""Inference side by side: the agent's own kernels, tflite-runtime, LiteRT and TFLite Micro, each in its own process.

Examples:
  stonechat bench inference
  stonechat bench inference models/micropython-1/model.tflite --json inference.json

Without MODEL it takes a generated 32-48-24-8-24-48-32 autoencoder, 5,760 multiply-accumulates. Latency is one run from
bytes to bytes, the best and the middle of many; start-up is a whole process from nothing to its first result; RSS is
what that process holds then; "as own" compares the bytes of 64 inputs. armhf runs under qemu: its figure is no
board's speed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..console import model_path, read_file
from ..proofs.interpreters import AGENT, Interpreter, interpreters

HELP = "latency, start-up, RSS and allocations of every runtime that is installed"
_SECONDS = 0.5
_LOG_COLUMNS = 120  # of the table where no terminal says how wide it is

# One script for CPython's runtimes and one for MicroPython's: both print a line of JSON.
CPYTHON = """
import json, sys, time
name, path, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
data = open(path, "rb").read()
if name == "own plain":
    from stonechat.model import load_model
    model = load_model(data, "plain")
    size, run = model.input_size, model.run
elif name == "tflite-micro":
    import numpy
    from tflite_micro.python.tflite_micro import runtime
    micro = runtime.Interpreter.from_bytes(data)
    shape = micro.get_input_details(0)["shape"]
    size = int(numpy.prod(shape))
    def run(x):
        micro.set_input(numpy.frombuffer(x, numpy.int8).reshape(shape), 0)
        micro.invoke()
        return micro.get_output(0).tobytes()
else:
    import numpy
    if name.startswith("LiteRT"):
        from ai_edge_litert import interpreter as module
    else:
        from tflite_runtime import interpreter as module
    kinds = module.OpResolverType
    kind = kinds.BUILTIN_REF if name.endswith("reference") else kinds.AUTO
    lite = module.Interpreter(model_content=data, experimental_op_resolver_type=kind)
    lite.allocate_tensors()
    source, target = lite.get_input_details()[0], lite.get_output_details()[0]
    shape, size = source["shape"], int(source["shape"].prod())
    def run(x):
        lite.set_tensor(source["index"], numpy.frombuffer(x, numpy.int8).reshape(shape))
        lite.invoke()
        return lite.get_tensor(target["index"]).tobytes()
def sample(k):
    return bytes([i * 37 + k * k * 11 & 255 for i in range(size)])
x = sample(1)
run(x)
figures = {}
for line in open("/proc/self/status"):
    if line.startswith("VmRSS"):
        figures["rss_kb"] = int(line.split()[1])
if seconds:
    clock = time.perf_counter
    times = []
    end = clock() + seconds
    while len(times) < 50 or clock() < end:
        start = clock()
        run(x)
        times.append(clock() - start)
    times.sort()
    figures["best_us"], figures["middle_us"] = times[0] * 1e6, times[len(times) // 2] * 1e6
    import tracemalloc
    tracemalloc.start()
    run(x)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    run(x)
    figures["allocated_bytes"] = tracemalloc.get_traced_memory()[1] - before
    import hashlib
    outputs = b"".join(bytes(run(sample(k))) for k in range(64))
    figures["sha256"] = hashlib.sha256(outputs).hexdigest()[:16]
print(json.dumps(figures))
"""
MICROPYTHON = """
import gc, json, time
from binascii import hexlify
from hashlib import sha256
from stonechat.model import load_model
with open(sys.argv[2], "rb") as file:
    model = load_model(file.read(), sys.argv[1].split()[-1])

def sample(k):
    return bytes([i * 37 + k * k * 11 & 255 for i in range(model.input_size)])

x = sample(1)
model.run(x)
figures = {}
with open("/proc/self/status") as file:
    for line in file:
        if line.startswith("VmRSS"):
            figures["rss_kb"] = int(line.split()[1])

def allocated():
    gc.collect()
    gc.disable()
    before = gc.mem_alloc()
    model.run(x)
    taken = gc.mem_alloc() - before
    gc.enable()
    return taken

def run(count):
    start = time.ticks_us()
    for _ in range(count):
        model.run(x)
    return time.ticks_diff(time.ticks_us(), start) / count

if float(sys.argv[3]):
    figures["allocated_bytes"] = allocated()
    count = max(1, int(20000 / max(1, run(3))))  # 20 ms a sample: the clock counts microseconds
    times = sorted([run(count) for _ in range(int(float(sys.argv[3]) * 50))])
    figures["best_us"], figures["middle_us"] = times[0], times[len(times) // 2]
    outputs = sha256()
    for k in range(64):
        outputs.update(model.run(sample(k)))
    figures["sha256"] = hexlify(outputs.digest()).decode()[:16]
print(json.dumps(figures))
"""
RUNTIMES = ("own plain", "tflite-micro", "tflite-runtime reference", "tflite-runtime", "LiteRT reference", "LiteRT")
BASE = "own plain"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=model_path, help="a .tflite or a shipped model (default: generated)")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="how long each is timed (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from stonechat.model import load_model

    with tempfile.TemporaryDirectory() as scratch:
        path = args.model or _generated(Path(scratch) / "generated.tflite")
        macs = load_model(read_file(path)).macs
        figures = {f"{name}, CPython": _cpython(name, path, args.seconds) for name in RUNTIMES}
        for target in interpreters():
            for name in ("own plain", "own viper"):
                figures[f"{name}, {target.name}"] = _micropython(target, name, path, args.seconds)
    result = {
        "model": str(args.model or "generated 32-48-24-8-24-48-32"),
        "macs": macs,
        "runs": figures,
        "ratios": _ratios(figures, macs),
    }
    _print(result)
    return result


def _generated(path: Path) -> Path:
    import numpy as np

    from ..proofs import generated

    path.write_bytes(generated.autoencoder(np.random.default_rng(1), [32, 48, 24, 8, 24, 48, 32]))
    return path


def _cpython(name: str, path: Path, seconds: float) -> dict[str, Any]:
    def child(duration: float) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", CPYTHON, name, str(path), str(duration)]
        environment = {**os.environ, "PYTHONPATH": str(AGENT)}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    return _figures(child, seconds)


def _micropython(target: Interpreter, name: str, path: Path, seconds: float) -> dict[str, Any]:
    if target.missing:
        return {"missing": target.missing}
    return _figures(lambda duration: target.run(MICROPYTHON, name, str(path), str(duration), heap="4m"), seconds)


def _figures(child: Any, seconds: float) -> dict[str, Any]:
    """Starts the process three times for one result each, and once more for the latency."""
    started = []
    for _ in range(3):
        start = time.perf_counter()
        done = child(0)
        started.append((time.perf_counter() - start) * 1000)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            return {"missing": said[-1] if said else f"exit {done.returncode}"}
    once = json.loads(done.stdout.splitlines()[-1])
    timed = json.loads(child(seconds).stdout.splitlines()[-1])
    return {**timed, "rss_kb": once.get("rss_kb"), "start_ms": min(started)}


def _ratios(figures: dict[str, dict[str, Any]], macs: int) -> dict[str, float]:
    """How many times faster than plain Python on the same interpreter, and nanoseconds per multiply-accumulate."""
    ratios = {}
    for name, found in figures.items():
        kernel, _, where = name.rpartition(", ")
        base = figures[f"{BASE}, {where}"]
        if "best_us" in found:
            ratios[f"{name}: ns per multiply-accumulate"] = found["best_us"] * 1000 / max(1, macs)
            if kernel != BASE and "best_us" in base:
                ratios[f"{name}: times faster than own plain there"] = base["best_us"] / found["best_us"]
    return ratios


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _LOG_COLUMNS
    table = Table("runtime", "best us", "middle us", "ns/MAC", "x plain", "start ms", "RSS MB", "B/run", "as own")
    base = result["runs"][f"{BASE}, CPython"]
    for name, found in result["runs"].items():
        if "missing" in found:
            table.add_row(name, found["missing"], *[""] * 7)
            continue
        ratio = result["ratios"].get(f"{name}: times faster than own plain there")
        table.add_row(
            name,
            f"{found['best_us']:.1f}",
            f"{found['middle_us']:.1f}",
            f"{result['ratios'][f'{name}: ns per multiply-accumulate']:.2f}",
            "" if ratio is None else f"{ratio:.1f}",
            f"{found['start_ms']:.0f}",
            f"{(found['rss_kb'] or 0) / 1000:.1f}",
            str(found["allocated_bytes"]),
            "same" if found["sha256"] == base.get("sha256") else "differ",
        )
    console.print(f"{result['model']}: {result['macs']} multiply-accumulates; armhf is emulated", soft_wrap=True)
    console.print(table)
