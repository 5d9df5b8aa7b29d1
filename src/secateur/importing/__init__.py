"""Import: read what other tools write, as dense tensors. One file for each kind of source."""

from __future__ import annotations

from secateur.models.at_rest import StoredForm, stored_forms
from secateur.registry import Registry

__all__ = ["import_formats"]

import_formats: Registry[StoredForm] = Registry("kind of source", __name__, "import_formats")

for form in stored_forms:  # all verbs read these
    import_formats.register(form)(stored_forms[form])
