"""What hatchling asks when it builds plywise: the long description, with links that work everywhere."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<start>!?\[[^\]]*\]\()(?!https?:|mailto:|#)(?P<target>[^)\s]+)\)")


class LongDescription(MetadataHookInterface):
    """README.md as the long description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the long description in ``metadata``."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        links = make_links_absolute(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": links}


def make_links_absolute(text: str, repository: str) -> str:
    """Let links of a page in Markdown lead to the repository's main branch, and pictures to its raw files."""

    def absolute(link: re.Match[str]) -> str:
        way = "raw" if link["start"].startswith("!") else "blob"
        return f"{link['start']}{repository}/{way}/main/{link['target']})"

    return LINK.sub(absolute, text)
