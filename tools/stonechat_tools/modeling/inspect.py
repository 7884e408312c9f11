"""Show what is in a .tflite, what it costs on a board, and how a run goes layer by layer.

Examples:
  stonechat inspect models/micropython-1/model.tflite
  stonechat inspect model.tflite --layers 00ff7f80
  stonechat inspect model.tflite --layers 0,-1,127,-128 --json
"""

import argparse
import json
import struct
import time
from pathlib import Path
from typing import Any

from stonechat import model_file
from stonechat.cbor_decode import loads
from stonechat.errors import ModelError, StonechatError
from stonechat.int8 import interpreter, operator_names, tflite
from stonechat.model import load_model
from stonechat.model_file import INFO_BUFFER
from stonechat.own_model import FORBIDDEN

from ..console import model_path, named, read_file

_ACTIVATIONS = ("", "relu", "relu -1..1", "relu6")
# What a run takes, by target: ns a multiply-accumulate, us an output of a dense layer, a layer, and a run. Fitted to
# five models in a simulation of the RP2040 cycle by cycle (`stonechat bench board --emulated`), within 8 %; flash cache
# misses come on top. The plain kernel's are an estimate.
SPEEDS = {
    "emulated RP2040 at 125 MHz, viper": (169.0, 2.5, 5.4, 129.0),
    "RP2040 at 125 MHz, plain (estimate)": (13_000.0, 60.0, 110.0, 129.0),
}
# Heap on 32 bit beside the data itself: per dense layer its objects, and once the graph and the interpreter. Measured.
_LAYER_BYTES = 190
_BASE_BYTES = 780
_BLOCK_BYTES = 16
_TLS_BYTES = 28 * 1024  # of heap, while a verified connection is made; measured on an emulated Pico W
# Milliseconds of a verified handshake with a broker over PPP, and of its longest tick; with a password, with a client
# certificate. By proofs/boards/handshake.py on the emulated RP2040.
_TLS_MS, _TLS_TICK_MS = (2337, 2552), (1663, 2475)
_SHORT = 60  # characters of a value that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model_path, help="a .tflite, or the name of a shipped model")
    parser.add_argument(
        "--layers", metavar="INPUT", help="run it: int8 as hex, as numbers with commas, or a file of bytes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    data = read_file(args.model)
    with named(args.model):
        facts = describe(data)
        network = interpreter.read(data) if args.layers is not None else None
    if network is not None:
        facts["run"] = run_layers(network, read_input(args.layers, network.input_size))
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(args.model, facts)
    return 0


def describe(data: bytes) -> dict[str, Any]:
    """Everything that --json prints, without a run. Raises ModelError, also where the plan is not the graph's."""
    model_file.prove(data)
    model, graph = load_model(data), tflite.read(data)
    layers = [_operator(graph, number) for number in range(graph.operator_count)]
    outputs = [layer["outputs"] for layer in layers if layer["operator"] == "FULLY_CONNECTED"]
    times = {
        name: round(ns * model.macs / 1000 + row * sum(outputs) + layer * len(outputs) + once, 1)
        for name, (ns, row, layer, once) in SPEEDS.items()
    }
    times["this machine, CPython plain (measured)"] = round(_measure_us(model), 1)
    return {
        "file_bytes": len(data),
        "digest": model.digest.hex(),
        "plan_bytes": model_file.sizes(data)[1],
        "input": _tensor(graph, graph.inputs[0]),
        "output": _tensor(graph, graph.outputs[0]),
        "macs": model.macs,
        "operators": layers,
        "memory": memory(model, len(data), layers),
        "run_us": times,
        "agent": agent(),
        "metadata": _metadata(model, graph),
    }


def memory(model: Any, file_bytes: int, layers: list[dict[str, Any]]) -> dict[str, int]:
    """Heap in bytes that a 32-bit board needs for the model, beside the code: an estimate."""
    held = _BASE_BYTES + model.input_size + model.output_size
    weights = chunk = 0
    for layer in layers:
        held += _blocks(layer["outputs"]) + _LAYER_BYTES
        if layer["operator"] == "FULLY_CONNECTED":
            rows, width = layer["weights"]
            weights += rows * width
            chunk = max(chunk, min(rows, max(1, 1024 // width)) * width)
            held += _blocks(4 * (7 + rows + 2 * (rows if layer["per_channel"] else 1)))
    return {
        "in a ROM partition": held + min(weights, max(chunk, 1024)),
        "from an open file": held + weights,
        "from an open file, weights streamed": held + chunk,
        "file in memory": held + weights + _blocks(file_bytes),
    }


def emulated() -> dict[str, Any]:
    """The figures of the last run of each phase of `stonechat bench board --emulated`, as its --json wrote them."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("emulated.json").read_text())
    return found


def agent() -> dict[str, str]:
    """What the agent around the model takes of an emulated RP2040, by the last `stonechat bench board --emulated`."""
    figures = emulated()["figures"]
    core, full = figures["rp2040 core now"], figures["rp2040 full now"]

    def both(name: str, unit: str) -> str:
        return f"{core[name][0]:,} / {full[name][0]:,} {unit}"

    names = {
        "idle tick": ("tick", "us"),
        "quiet window": ("window", "us"),
        "report": ("report", "us"),
        "report that explains an alarm": ("report of an alarm", "us"),
        "least free heap, from files": ("least heap, files", "bytes"),
        "least free heap, from ROMFS": ("least heap, ROMFS", "bytes"),
        "least free heap, frozen": ("least heap, frozen", "bytes"),
    }
    found = {label: both(*name) for label, name in names.items()}
    return {
        **found,
        "more heap while TLS connects": f"{_TLS_BYTES:,} bytes",
        "TLS handshake, password / certificate": "{:,} / {:,} ms".format(*_TLS_MS),
        "longest tick in it": "{:,} / {:,} ms".format(*_TLS_TICK_MS),
    }


def run_layers(network: interpreter.Interpreter, x: bytes) -> list[dict[str, Any]]:
    """The input and each operator's output in a run, as int8 values."""
    network.run(x)
    values = network.values
    steps = [{"layer": "input", "values": _signed(x)}]
    for number in range(network.graph.operator_count):
        code, _, (target,), _ = network.graph.operator(number)
        steps.append(
            {
                "layer": f"{number} {operator_names.name(code)}",
                "values": _signed(bytes(b ^ 128 for b in values[target])),
            }
        )
    return steps


def read_input(text: str, size: int) -> bytes:
    """An input as the command line gives it. Raises ModelError where it is not `size` int8."""
    path = Path(text)
    try:
        if path.is_file():
            x = read_file(path)
        elif "," in text:
            x = struct.pack(f"{text.count(',') + 1}b", *map(int, text.split(",")))
        else:
            x = bytes.fromhex(text)
    except (ValueError, struct.error) as error:
        raise ModelError(f"--layers {text}: neither a file, nor hex, nor numbers from -128 to 127 ({error})") from error
    if len(x) != size:
        raise ModelError(f"--layers: {len(x)} values, the model takes {size}")
    return x


def _operator(graph: tflite.Graph, number: int) -> dict[str, Any]:
    code, inputs, (target,), options = graph.operator(number)
    facts = {"operator": operator_names.name(code), **_tensor(graph, target), "outputs": graph.tensor(target).size}
    if facts["operator"] == "FULLY_CONNECTED":
        weights = graph.tensor(inputs[1])
        scales = [_float(graph.u32(weights.scale_at + 4 * i)) for i in range(weights.scales)]
        facts |= {
            "weights": list(weights.shape),
            "macs": weights.size,
            "per_channel": len(scales) > 1,
            "weight_scale": [min(scales), max(scales)] if len(scales) > 1 else scales,
            "activation": _ACTIVATIONS[graph.byte(options, 0) if options else 0],
        }
    return facts


def _tensor(graph: tflite.Graph, number: int) -> dict[str, Any]:
    tensor = graph.tensor(number)
    kind = {tflite.INT8: "int8", tflite.FLOAT32: "float32"}.get(tensor.kind, f"type {tensor.kind}")
    scale = _float(tensor.scale) if tensor.scales else None
    return {"shape": list(tensor.shape), "type": kind, "scale": scale, "zero_point": tensor.zero_point}


def _metadata(model: Any, graph: tflite.Graph) -> dict[str, Any]:
    """What the device reads, what only the tools read, and why one of them can't be read."""
    facts: dict[str, Any] = {}
    try:
        if model.metadata:
            facts["stonechat"] = {key: _plain(value) for key, value in vars(model.metadata).items()}
            facts["stonechat"]["own_model"] = graph.metadata(FORBIDDEN) is None
        info = graph.metadata(INFO_BUFFER)
        if info:
            facts["stonechat.info"] = _plain(loads(bytes(info)))
    except StonechatError as error:
        facts["error"] = str(error)
    return facts


def _plain(value: Any) -> Any:
    """What JSON can hold: bytes become hex."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _measure_us(model: Any) -> float:
    x = bytes(model.input_size)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        model.run(x)
        best = min(best, time.perf_counter() - started)
    return best * 1e6


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _signed(values: bytes) -> list[int]:
    return list(struct.unpack(f"{len(values)}b", values))


def _blocks(count: int) -> int:
    return -(-count // _BLOCK_BYTES) * _BLOCK_BYTES


def _print(path: Path, facts: dict[str, Any]) -> None:
    from rich.table import Table

    from ..screen import Screen, bold

    console = Screen(highlight=False)
    console.print(f"{path}: {facts['file_bytes']} bytes, {facts['macs']} multiply-accumulates", soft_wrap=True)
    plan = f"plan of {facts['plan_bytes']} bytes" if facts["plan_bytes"] else "no plan: a board needs --with int8"
    console.print(f"digest {facts['digest']}, {plan}")
    table = Table("", "operator", "output", "weights", "scales", "scale", "zero")
    table.add_row("", "input", _shape(facts["input"]), "", "", *_quantization(facts["input"]))
    for number, layer in enumerate(facts["operators"]):
        dense = "weights" in layer
        table.add_row(
            str(number),
            f"{layer['operator']} {layer.get('activation', '')}",
            _shape(layer),
            "x".join(map(str, layer["weights"])) if dense else "",
            ("per channel" if layer["per_channel"] else "per tensor") if dense else "",
            *_quantization(layer),
        )
    console.print(table)
    for title, unit, values in (
        ("heap on a 32-bit board, estimated", "bytes", facts["memory"]),
        ("time of a run", "us", facts["run_us"]),
    ):
        table = Table(title, unit)
        for name, value in values.items():
            table.add_row(name, f"{value:,}")
        console.print(table)
    table = Table("the agent on an emulated RP2040, micropython-1", "core / full")
    for name, text in facts["agent"].items():
        table.add_row(name, text)
    console.print(table)
    _print_metadata(console, facts["metadata"])
    for step in facts.get("run", []):
        console.print(bold(step["layer"], f" {' '.join(map(str, step['values']))}"), soft_wrap=True)


def _print_metadata(console: Any, metadata: dict[str, Any]) -> None:
    """A line for each short value of what the device reads and the tools read; --json has all."""
    from ..screen import bold

    for name, value in metadata.items():
        if not isinstance(value, dict):
            console.print(bold(name, f" {value}"), soft_wrap=True)
            continue
        console.print(bold(name))
        for key, one in value.items():
            text = json.dumps(one)
            if len(text) > _SHORT:
                text = f"{len(one)} values" if isinstance(one, (list, dict)) else f"{text[:_SHORT]}..."
            console.print(f"  {key}: {text}", soft_wrap=True)
    console.print("--json prints every value")


def _shape(tensor: dict[str, Any]) -> str:
    return f"{tensor['type']} {'x'.join(map(str, tensor['shape']))}"


def _quantization(tensor: dict[str, Any]) -> tuple[str, str]:
    return ("" if tensor["scale"] is None else f"{tensor['scale']:.5g}", str(tensor["zero_point"]))
