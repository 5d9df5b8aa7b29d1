"""The stub is that of the declared options."""

from __future__ import annotations

import option_files
import secateur


def test_the_stub_is_up_to_date() -> None:
    """If not: `python tools/option_files.py`."""
    file = option_files.ROOT / option_files.STUB
    assert file.read_text(encoding="utf-8") == option_files.stub()


def test_the_stub_declares_every_public_name() -> None:
    text = option_files.stub()
    for name in secateur.__all__:
        assert f"def {name}(" in text or f" as {name}" in text or f"{name}: " in text
    assert "sparsity: float | None = None," in text
