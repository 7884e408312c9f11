"""The bundle of one device: everything that `stonechat-agent install` puts on it, in one file of mode 0600."""

import io
import tarfile
from pathlib import Path

from stonechat.errors import ConfigError, ModelError
from stonechat.linux import bundle
from stonechat.model import load_model

from ..console import read_file


def make_bundle(folder: Path) -> bytes:
    """The files of `folder` (devices/NAME of a fleet) that a bundle may hold -> the archive. Without a model.tflite
    in it the device takes the shipped model that works there. Raises ConfigError, OSError."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in bundle.FILES:
            if (folder / name).is_file():
                data = (folder / name).read_bytes()
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                entry.mode = 0o600
                archive.addfile(entry, io.BytesIO(data))
    try:
        bundle.parse(packed.getvalue())  # as the device will
    except ValueError as error:
        raise ConfigError(f"{folder}: no bundle can be made of it: {error}") from None
    return packed.getvalue()


def check_model(path: Path) -> bytes:
    """The bytes of a model that an agent will take. Raises ModelError, ConfigError where it will not, OSError."""
    most = bundle.FILES["model.tflite"][0]
    try:
        data = read_file(path, most)
    except ConfigError as error:
        raise ConfigError(f"--model {error}") from None
    try:
        metadata = load_model(data).metadata
    except ModelError as error:
        raise ModelError(f"--model {path}: {error}") from None
    if metadata is None:
        raise ModelError(f"--model {path}: it has no stonechat metadata; make one with `stonechat train`")
    return data
