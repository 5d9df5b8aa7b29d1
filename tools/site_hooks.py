"""What mkdocs does with each page that Markdown cannot say; `mkdocs.yml` names this file."""

from __future__ import annotations

import re
from typing import Any

CODE = re.compile(r"(?<!</span>)<code>(.*?)</code>")  # blocks of code begin with a span
FLAG = re.compile(r"(?<![\w-])--?[a-z][\w-]*")


def on_page_content(html: str, **_: Any) -> str:
    """Keep a flag within a line of text on one line: a browser breaks lines behind every dash."""

    def unbroken(code: re.Match[str]) -> str:
        return FLAG.sub(r'<span class="flag">\g<0></span>', code[0])

    return CODE.sub(unbroken, html)
