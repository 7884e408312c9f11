"""Images of a ROM partition: what MicroPython's own tool makes, and what a board without one is answered."""

from pathlib import Path

import pytest
from stonechat_tools.device import deploy, romfs
from stonechat_tools.device.build import build, rom_image

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/micropython-1/model.tflite"


def test_an_image_is_what_mpremote_makes(tmp_path: Path) -> None:
    writer = pytest.importorskip("mpremote.romfs")
    files = {"lib/a/one.mpy": bytes(200), "lib/a/two.mpy": b"x" * 20_000, "model.tflite": b"m" * 131, "lib/z": b""}
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    assert romfs.image(files) == writer.make_romfs(str(tmp_path), mpy_cross=None)
    assert romfs.image(files | {"odd": b"o"}) != romfs.image(files)


@pytest.mark.parametrize("files", [{"a": b"", "a/b": b""}, {"a/b": b"", "a": b""}, {"ä": b""}])
def test_names_that_an_image_can_not_have_are_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError):
        romfs.image(files)


def test_an_image_of_a_build_holds_every_module_and_the_model(tmp_path: Path) -> None:
    built = build("armv6m", tmp_path, profile="core")
    made = rom_image(built, MODEL)
    assert MODEL.read_bytes() in made
    for module in built.sizes:
        assert (tmp_path / f"stonechat/{module}.mpy").read_bytes() in made


@pytest.mark.parametrize(("rom", "fits"), [(0, False), (1000, False), (131_072, True)])
def test_a_board_without_a_partition_gets_files(rom: int, fits: bool, capsys: pytest.CaptureFixture[str]) -> None:
    facts = deploy.Facts("a board", "1.26.0", "armv6m", (6, 3), 100_000, 200_000, (), rom)
    assert deploy.fits_rom(facts, 30_000) is fits
    assert ("take no heap" if fits else "files instead") in capsys.readouterr().out
