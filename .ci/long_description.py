"""What a package index shows: the README without links that only lead somewhere in a checkout.

An index renders the README by itself, so its relative links would be dead. They become the plain
path of a file, which the source distribution holds. Once pyproject.toml names the repository as
``Source`` under [project.urls], they lead there instead.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_NOTE = "Paths such as `docs/benchmarks.md` are those of the source distribution.\n\n"


def long_description(readme: str, source: str | None) -> str:
    """Return ``readme`` with absolute links only; others are plain text without ``source``."""

    def plain(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        if "://" in target or target.startswith("#"):
            return link[0]
        if source:
            return f"[{text}]({source.rstrip('/')}/blob/main/{target})"
        path = target.partition("#")[0]
        return text if text == path else f"{text} (`{path}`)"

    title, body = readme.split("\n\n", 1)
    body = re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", plain, body)
    return f"{title}\n\n{'' if source else _NOTE}{body}"


class LongDescription(MetadataHookInterface):
    """Gives ``project.readme`` to hatchling."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the text that an index shows."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": long_description(readme, source),
        }
