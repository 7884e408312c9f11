"""The reference models that come with the package: `linux-1` may be written wherever a model's file is asked for."""

import os

from ..errors import ConfigError

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models")


def names() -> list:
    """Names of the models that are there, sorted."""
    found = os.listdir(FOLDER) if os.path.isdir(FOLDER) else []
    return sorted(name for name in found if os.path.isfile(os.path.join(FOLDER, name, "model.tflite")))


def path(text: str) -> str:
    """A shipped model's name -> its file. Anything else, a file of that name too, comes back as it is."""
    file = os.path.join(FOLDER, text, "model.tflite")
    return file if "/" not in text and not os.path.isfile(text) and os.path.isfile(file) else text


def choose() -> "tuple[str, str]":
    """The best shipped model that works here -> (its name, why)."""
    from .collector import LinuxCollector

    collector = LinuxCollector(use_bpf="auto")
    try:
        name = collector.schema.name
    finally:
        collector.close()
    return name, "BPF works here" if name == "linux-1" else "without BPF; `stonechat doctor` says why"


def read(name: str) -> bytes:
    """A shipped model. Raises ConfigError."""
    try:
        with open(os.path.join(FOLDER, name, "model.tflite"), "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError("the package lacks the model %s: %s" % (name, error.strerror))
