"""``python -m vlmprune.cli`` is the same as ``vlmprune``."""

from __future__ import annotations

import sys

from vlmprune.cli import main

sys.exit(main())
