"""Proves the arithmetic: the agent's own kernels against TFLite Micro and tflite-runtime's reference kernels.

    stonechat soak exact     0 differing bytes over 10,000 inputs for each of 60 generated models

Each model runs in plain Python here and in viper on MicroPython, over the same inputs as the two oracles; on
MicroPython by its plan, as a board runs it, where it is a chain of dense layers.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from stonechat.errors import ModelError
from stonechat.model import load_model

from ..modeling.oracles import ORACLES, inputs, outputs
from . import generated
from .interpreters import interpreter

INPUTS_PER_MODEL = 10_000


VIPER = """
from stonechat.model import load_model
with open(sys.argv[1], "rb") as file:
    model = load_model(file.read(), sys.argv[4])
x = bytearray(model.input_size)
with open(sys.argv[2], "rb") as source, open(sys.argv[3], "wb") as target:
    while source.readinto(x):
        target.write(model.run(x))
"""


def viper_outputs(data: bytes, inputs: NDArray[np.int8], target: str = "unix-x64") -> NDArray[np.int8]:
    """The same from the viper kernels of a MicroPython target. Raises ModelError where it can't be run."""
    micropython = interpreter(target)
    if micropython.missing:
        raise ModelError(f"{target}: {micropython.missing}")
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / name for name in ("model", "inputs", "outputs")]
        files[0].write_bytes(generated.planned(data, load_model(data, "plain").input_size))
        files[1].write_bytes(inputs.tobytes())
        done = micropython.run(VIPER, *map(str, files), "viper")
        if done.returncode:
            raise ModelError(f"{target}: {done.stdout}{done.stderr}")
        return np.frombuffer(files[2].read_bytes(), np.int8).reshape(len(inputs), -1)


def differences(data: bytes, inputs: NDArray[np.int8], viper: bool = True) -> dict[str, int]:
    """How many output bytes differ from the agent's plain kernels, by runtime."""
    own = outputs(load_model(data, "plain"), inputs)
    found = {name: int((outputs(oracle(data), inputs) != own).sum()) for name, oracle in ORACLES.items()}
    if viper:
        found["own viper"] = int((viper_outputs(data, inputs) != own).sum())
    return found


def soak(scale: float) -> bool:
    count = max(3, int(INPUTS_PER_MODEL * scale))
    generator = np.random.default_rng(7)
    totals: dict[str, int] = {}
    compared = models = 0
    started = time.monotonic()
    for name, data in generated.claim_models().items():
        model = load_model(data)
        found = differences(data, inputs(generator, model.input_size, count))
        compared += count * model.output_size
        models += 1
        totals = {runtime: totals.get(runtime, 0) + found[runtime] for runtime in found}
        if any(found.values()):
            print(f"  {name}: {found}")
    print(f"{models} models x {count} inputs, {compared} output bytes in {time.monotonic() - started:.0f} s")
    for runtime, differing in totals.items():
        print(f"  {runtime}: {differing} bytes differ")
    return not any(totals.values())
