"""Writes python_reference.txt: 100 kB of English prose, from Python's own help texts (pydoc_data.topics).

Copyright (c) Python Software Foundation, under the PSF License Version 2 (docs.python.org/3/license.html).
"""

from pathlib import Path
from pydoc_data import topics

SIZE = 100_000


def main() -> None:
    chosen: list[str] = []
    size = 0
    for name in sorted(topics.topics):
        text = topics.topics[name].strip()
        if size + len(text) <= SIZE:
            chosen.append(text)
            size += len(text)
    text = "\n\n\n".join(chosen).encode("ascii", "replace").decode()[: SIZE - 1]
    Path(__file__).with_name("python_reference.txt").write_text(text + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
