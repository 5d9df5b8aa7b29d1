"""The page at `/`: the model, the paths and an example."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute

HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{
  color-scheme: light dark;
  --paper: light-dark(#fbfaf6, #14181a); --card: light-dark(#ffffff, #1c2224);
  --ink: light-dark(#1d2421, #e6e9e4); --line: light-dark(#e2e0d6, #2e3638);
  --green: light-dark(#0f7a52, #4cc38f);
}}
body {{
  max-width: 46rem; margin: 0 auto; padding: 2rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 ui-sans-serif, system-ui, sans-serif;
  overflow-wrap: anywhere;
}}
h1 {{ font: 600 1.9rem/1.2 ui-serif, Georgia, serif; margin: 0 0 0.4rem; }}
td {{ padding: 0.3rem 1rem 0.3rem 0; border-bottom: 1px solid var(--line); }}
code, pre {{ font: 0.84em ui-monospace, Menlo, monospace; }}
td code {{ color: var(--green); }}
pre {{
  padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  white-space: pre-wrap;
}}
</style>
<h1>{title}</h1>
<p>Secateur serves this model with OpenAI's API.</p>
<table>
{rows}
</table>
<pre>{example}</pre>
</html>
"""


@dataclass(frozen=True)
class FrontPage:
    """Answers `/`: HTML for browsers, else text. Without the API key it does not name the model.

    Args:
        name: of the model.
        paths: from `paths_of`.
        api_key: what clients send; None: nothing.
    """

    name: str
    paths: Sequence[tuple[str, str, str]]
    api_key: str | None

    async def answer(self, request: Request) -> Response:
        """Answer a request."""
        title = self.name if self.api_key is None else "A language model"
        key = "" if self.api_key is None else ' -H "Authorization: Bearer $SECATEUR_API_KEY"'
        example = (
            f'curl {request.base_url}v1/completions -H "Content-Type: application/json"{key} \\\n'
            '     -d \'{"prompt": "The capital of France is", "max_tokens": 16}\''
        )
        if "text/html" not in request.headers.get("accept", ""):
            lines = [f"{method:4} {path:24} {what}" for method, path, what in self.paths]
            return PlainTextResponse("\n".join((title, "", *lines, "", example, "")))
        rows = "\n".join(
            f"<tr><td><code>{method} {html.escape(path)}</code><td>{html.escape(what)}"
            for method, path, what in self.paths
        )
        page = PAGE.format(title=html.escape(title), rows=rows, example=html.escape(example))
        return HTMLResponse(page, headers=HEADERS)


def paths_of(app: FastAPI) -> list[tuple[str, str, str]]:
    """The paths of an application: method, path, and what it answers."""
    return [
        (method, route.path.replace(":path", ""), route.description)
        for route in app.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in sorted(route.methods or ())
    ]
