"""Models whose weights are stored in fewer bits: every form that all verbs read."""

from __future__ import annotations

from secateur.importing import import_formats
from secateur.models.at_rest import stored_forms

for form in stored_forms:
    import_formats.register(form)(stored_forms[form])
