"""Every link and picture in the project's Markdown leads somewhere; part of `make lint`.

Files and headings are looked up; addresses on the web are not.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from oxe_mix.text import complain

ROOT = Path(__file__).parents[1]
_HERE = ("*.md", "docs/*.md", "examples/**/*.md")


def main() -> None:
    """Print what leads nowhere; exit 1 when something does."""
    pages = sorted(page for pattern in _HERE for page in ROOT.glob(pattern))
    problems = [problem for page in pages for problem in broken(page)]
    for problem in problems:
        complain(problem)
    sys.exit(bool(problems))


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for target in _targets(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = page if not path else page.parent / path
        if not file.exists():
            found.append(f"{page.name}: {target}: no such file")
        elif heading and heading not in headings(file.read_text()):
            found.append(f"{page.name}: {target}: no such heading")
    return found


def headings(text: str) -> set[str]:
    """The anchors of a page, as code hosts make them."""
    tokens = MarkdownIt().parse(text)
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _targets(text: str) -> list[str]:
    def within(tokens: list[Token]) -> list[str]:
        found = []
        for token in tokens:
            for name in ("href", "src"):
                if name in token.attrs:
                    found.append(str(token.attrs[name]))
            found += within(token.children or [])
        return found

    return within(MarkdownIt().enable("table").parse(text))


if __name__ == "__main__":
    main()
