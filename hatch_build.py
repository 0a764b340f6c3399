"""The README as a package index shows it. Relative links and images lead nowhere there: only their text stays."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Readme(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = re.sub(r"^!\[.*?\]\((?!https:).*?\)\n\n?", "", text, flags=re.MULTILINE)
        text = re.sub(r"\[(.*?)\]\((?!https:).*?\)", r"\1", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
