"""What the documents say of the tree is true: paths, folders, counts of lines."""

import re

import pytest

from tests.test_structure import PATHS, REPOSITORY

FOLDERS = ("llama", "kernels", "tests", "tools", "benchmarks", "docs")
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "tests/README.md",
    "docs/architecture.md",
    "docs/http.md",
    "docs/deterministic.md",
    "docs/speculation.md",
    "docs/research.md",
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_documents_exist(document):
    """What looks like a path of ours is one, from the repository's root; a document names whole paths."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text))
    linked = {str((REPOSITORY / document).parent / link) for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)}
    assert [path for path in sorted(named | linked) if not (REPOSITORY / path).exists()] == []


def test_readme_counts_the_lines_that_it_names():
    """To within a twentieth: those of the core path, whose files it lists, and those of the whole."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Reading the code")[1].split("\n## ")[0]
    core, files, everything = re.search(
        r"is ([\d,]+) lines in (\d+) files.*?the ([\d,]+) lines", section, re.S
    ).groups()
    listed = re.findall(r"^    (\S+\.py) ", section, re.MULTILINE)
    lengths = {name: len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) for name in PATHS}
    assert len(listed) == int(files)
    for told, lines in ((core, sum(lengths[name] for name in listed)), (everything, sum(lengths.values()))):
        assert abs(int(told.replace(",", "")) - lines) <= lines / 20, lines


@pytest.mark.parametrize(("top", "document"), [("llama", "docs/architecture.md"), ("tests", "tests/README.md")])
def test_every_folder_has_its_line(top, document):
    folders = {path.parent.name for path in (REPOSITORY / top).glob("*/*.py")}
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    table = set(re.findall(rf"^\| `{top}/(\w+)` \|", text, re.MULTILINE))
    assert folders - {"kernels"} <= table
