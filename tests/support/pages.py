"""The pages of documentation: their fenced blocks, links and headings."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from commands import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(
        ROOT / name
        for name in ("infra/README.md", "infra/mlflow/README.md", "search_spaces/README.md", "examples/README.md")
    ),
]
NOT_RUN = {
    "install": "installs packages or runs the whole test suite",
    "cluster": "needs a Ray cluster with a token, or a bucket",
    "cloud": "needs AWS, Kubernetes or another machine",
    "server": "starts a server that does not end, or sends requests to it",
}
"""Words after a block's language, and why such a block is only parsed."""
_FENCE = re.compile(r"^( *)```(\S*)(.*?)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block; `marks` are the words after its language."""

    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self):
        """The lines of a shell block, continued ones joined, without comments and prompts."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.join(words) if "|" not in line else line for line in lines if (words := _words(line))]


def _words(line):
    return shlex.split(line, comments=True)


def blocks(page, *languages):
    """The blocks of a page in these languages, in order."""
    content = page.read_text()
    found = []
    for match in _FENCE.finditer(content):
        indent, language, marks, text = match.groups()
        if language in languages:
            text = re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)
            found.append(Block(page, content[: match.start()].count("\n") + 1, language, tuple(marks.split()), text))
    return found


def prose(page):
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def links(page):
    """The targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page):
    """What GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
