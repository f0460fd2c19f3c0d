"""What the site has of files outside of docs/: CONTRIBUTING.md and the cards of shipped policies."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "esper" / "pretrained"


def on_files(files: Files, config: Any) -> Files:
    """Adds them as pages."""
    files.append(File.generated(config, "contributing.md", abs_src_path=str(ROOT / "CONTRIBUTING.md")))
    for card in sorted(CARDS.glob("*.md")):
        files.append(File.generated(config, f"cards/{card.name}", abs_src_path=str(card)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Makes links between them and the pages of docs/ links of the site."""
    if page.file.src_uri.startswith("cards/"):
        return markdown.replace("](../../docs/", "](../")
    if page.file.src_uri == "contributing.md":
        return markdown.replace("](docs/", "](")
    return markdown.replace("](../esper/pretrained/", "](cards/").replace("](../CONTRIBUTING.md", "](contributing.md")
