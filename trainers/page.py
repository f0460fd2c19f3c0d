"""An evaluation as one HTML file that needs nothing else: no network, no script, for light and for dark screens."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trainers.pictures import Picture

# default-src 'none': whatever a browser is told to fetch by mistake, it does not.
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark;
  --page: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --mark: #fff4e5; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #15181d; --ink: #d6dbe1; --soft: #98a2ad; --line: #343a42; --mark: #33281a; }}
}}
body {{ margin: 2.5rem auto; padding: 0 1.25rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }}
h2 {{ font-size: 1.2rem; margin: 2.5rem 0 .5rem; }}
p {{ margin: .5rem 0; max-width: 48rem; }}
code {{ font: .88em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }}
.soft, figcaption {{ color: var(--soft); font-size: .9rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th {{ font-weight: 600; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; padding-left: .25rem; }}
tr.mark td {{ background: var(--mark); font-weight: 600; }}
figure {{ margin: 1rem 0 0; }}
figure img {{ max-width: 100%; height: auto; display: block; }}
figcaption {{ margin-top: .5rem; max-width: 48rem; }}
</style>
</head>
<body>
"""


@dataclass(frozen=True)
class TableOf:
    """A table, with the rows whose first cell is `mark` set off.

    Attributes:
        title: above it.
        headings: of its columns.
        rows: its cells.
        mark: see above.
        note: below the title.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    mark: str
    note: str = ""


def render(title: str, lead: str, checkpoint: str, reading: str, tables: list[TableOf], drawn: list[Picture]) -> str:
    """The page.

    Args:
        title: heading.
        lead: what was compared.
        checkpoint: of what.
        reading: how to read the first table.
        tables: the first one stands above the pictures, the others below.
        drawn: the pictures.
    """
    first, *others = tables
    parts = [
        _HEAD.format(title=escape(title)),
        f"<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>",
        f'<p class="soft">Checkpoint: <code>{escape(checkpoint)}</code></p>',
        _table(first),
        f"<h2>How to read it</h2>\n<p>{escape(reading)}</p>",
        *map(_picture, drawn),
        *map(_table, others),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _table(table: TableOf) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.headings)
    lines = []
    for row in table.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        kind = ' class="mark"' if row[0] == table.mark else ""
        lines.append(f"<tr{kind}>{cells}</tr>")
    note = f'<p class="soft">{escape(table.note)}</p>\n' if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2>\n{note}<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _picture(picture: Picture) -> str:
    light, dark = map(_embedded, picture.svg())
    # As a picture of its own, so that names inside of one drawing cannot clash with those of another.
    return (
        f'<h2>{escape(picture.title)}</h2>\n<figure id="{escape(picture.name)}">\n<picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(picture.title)}"></picture>\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
    )


def _embedded(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
