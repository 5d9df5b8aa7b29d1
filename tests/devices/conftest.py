"""`parts/` is collected only by the process that `rehearse.py` starts."""

from __future__ import annotations

import os

collect_ignore = [] if "PRETENDED_CUDA" in os.environ else ["parts"]
