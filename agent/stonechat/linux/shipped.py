"""The reference models that come with the package: `linux-1` may be written wherever a model's file is asked for."""

import os

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models")


def names() -> list:
    """Names of the models that are there, sorted."""
    found = os.listdir(FOLDER) if os.path.isdir(FOLDER) else []
    return sorted(name for name in found if os.path.isfile(os.path.join(FOLDER, name, "model.tflite")))


def path(text: str) -> str:
    """A shipped model's name -> its file. Anything else, a file of that name too, comes back as it is."""
    file = os.path.join(FOLDER, text, "model.tflite")
    return file if "/" not in text and not os.path.isfile(text) and os.path.isfile(file) else text
