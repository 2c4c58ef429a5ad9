"""For mkdocs: the pages link to the repository's files, which a site does not hold; there they become plain text."""

import posixpath
import re

_LINK = re.compile(r"(?<!!)\[([^]]+)\]\((\.\./[^)#]+)\)")


def on_page_markdown(markdown: str, page, **_: object) -> str:
    """Turn links that leave docs/ into their text."""

    def plain(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), link[2]))
        return link[0] if target.startswith("docs/") else link[1]

    return _LINK.sub(plain, markdown)
