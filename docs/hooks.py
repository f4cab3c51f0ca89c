"""mkdocs hooks: links out of docs/ work on the site as they do in the repository.

A picture under bench/results is copied into the site; any other file is linked at the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?P<start>\]\()(?P<target>\.\./[^)\s#]+)(?P<end>[^)]*\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of bench/results to the site."""
    for picture in sorted((ROOT / "bench" / "results").rglob("*.png")):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links that leave docs/ at the copied picture, or at the file in the repository."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, match["target"]))
        if path.startswith("docs/"):
            return match[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(
                f"{page.file.src_uri} links {match['target']}: there is no {path}"
            )
        if files.get_file_from_path(path) is not None:
            target = posixpath.relpath(path, folder or ".")
        else:
            target = f"{config['repo_url']}/blob/main/{path}"
        return f"{match['start']}{target}{match['end']}"

    return _LINK.sub(replaced, markdown)
