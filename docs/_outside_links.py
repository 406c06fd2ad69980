"""A MkDocs hook: links from a page to files outside docs/, such as `../bench/results/x.json`.

The pages are read in the repository too, where these links work. On the site they become links into the repository if
`repo_url` is set in mkdocs.yml, and otherwise the path as code. If a link's file does not exist, that is a warning, and
so an error in `mkdocs build --strict`.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>(?:\.\./)[^)\s]+)\)")

logger = logging.getLogger("mkdocs.hooks.outside_links")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of one page; links to other pages stay as they are."""
    root = Path(config["config_file_path"]).parent
    docs = Path(config["docs_dir"])

    def rewritten(match: re.Match[str]) -> str:
        path, _, anchor = match["target"].partition("#")
        place = Path(os.path.normpath(docs / Path(page.file.src_uri).parent / path))
        if place.is_relative_to(docs):
            return match[0]
        if not place.is_relative_to(root) or not place.exists():
            logger.warning("%s: the link target %s does not exist", page.file.src_uri, match["target"])
            return match[0]
        name = place.relative_to(root).as_posix()
        if config["repo_url"]:
            url = f"{config['repo_url'].rstrip('/')}/blob/main/{name}"
            return f"[{match['text']}]({url}{'#' + anchor if anchor else ''})"
        text = match["text"].strip("`")
        return f"`{name}`" if text in (name, place.name) else f"{match['text']} (`{name}`)"

    return _LINK.sub(rewritten, markdown)
