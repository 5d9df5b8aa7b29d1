"""The stub and the page of options say what the sections declare."""

from __future__ import annotations

import option_files
import secateur


def test_the_stub_and_the_page_are_up_to_date() -> None:
    """If not: `python tools/option_files.py`."""
    for file, text in (
        (option_files.STUB, option_files.stub()),
        (option_files.PAGE, option_files.page()),
    ):
        assert (option_files.ROOT / file).read_text(encoding="utf-8") == text, file


def test_the_stub_declares_every_public_name() -> None:
    text = option_files.stub()
    for name in secateur.__all__:
        assert f"def {name}(" in text or f" as {name}" in text or f"{name}: " in text
    assert "sparsity: float | None = None," in text
