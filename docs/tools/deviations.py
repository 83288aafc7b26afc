"""Writes docs/deviations.md from the table of tests/support/deviations.py.

    python -P docs/tools/deviations.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

if __name__ == "__main__":
    from deviations import document
    (ROOT / "docs" / "deviations.md").write_text(document(), encoding="utf-8")
