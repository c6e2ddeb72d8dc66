"""README.md as a package index shows it: links that are relative in the repository have complete addresses.

The repository's own copy keeps relative links, which a test follows. The address is [project.urls] in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?://|#|mailto:)([^)\s]+)\)")


def complete(readme: str, repository: str) -> str:
    """A page of the repository's top folder with complete addresses; pictures are named as files, not as pages."""
    kinds = {"": "blob", "!": "raw"}
    return _LINK.sub(lambda found: f"{found[1]}{found[2]}{repository}/{kinds[found[1]]}/main/{found[3]})", readme)


class CompleteLinks(MetadataHookInterface):
    """Sets `readme`, which pyproject.toml declares as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Read README.md and complete its links."""
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = complete(readme, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
