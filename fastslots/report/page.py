"""One self-contained HTML file: facts as JSON, with the style and scripts of ``web/`` put inside.

Nothing is loaded from anywhere: a content security policy in the page forbids it. All text of a run reaches the page as
JSON, and its scripts put it there as text, never as markup.

Bound on size: a run adds at most POINTS points a curve (about 15 kB with its range), GRIDS pictures of GRID_BYTES and
IMAGES explorer sheets of SHEET_BYTES, a third more in base64: under 6 MB a run whatever its length and resolution.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WEB = Path(__file__).parent / "web"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(runs: Sequence[dict[str, Any]], compare: dict[str, Any] | None = None) -> str:
    """The page of one run, or of several side by side; ``runs``: what ``run_facts`` returns.

    compare: how they differ (``fastslots compare``), which then comes first.
    """
    names = [html.escape(run["name"]) for run in runs]
    header = "".join(f"<div class=run><h1>{name}</h1></div>" for name in names)
    return assemble(
        title=", ".join(names) + " - fastslots",
        body=f"<header>{header}</header><main></main><noscript>This page draws itself with JavaScript.</noscript>",
        facts={"runs": list(runs), "compare": compare},
        scripts=("dom.js", "charts.js", "explorer.js", "measured.js", "page.js"),
        policy=POLICY,
    )


def assemble(title: str, body: str, facts: dict[str, Any], scripts: Sequence[str], policy: str) -> str:
    """title and body are HTML; facts become the JSON of the element #facts, which no text in it can end."""
    # Files that others have written may hold NaN or infinities, which no JSON is: null.
    facts = json.loads(json.dumps(facts), parse_constant=lambda name: None)
    data = json.dumps(facts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    code = "".join(f"<script>\n{(WEB / name).read_text()}</script>" for name in scripts)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}"><link rel=icon href="data:,">'
        f"<title>{title}</title><style>\n{(WEB / 'page.css').read_text()}</style>"
        f"<body>{body}<script type=application/json id=facts>{data}</script>{code}</body></html>\n"
    )
