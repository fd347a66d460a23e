"""Makes ``python -m piece_ops`` the same as the ``piece-ops`` command."""

from __future__ import annotations

import sys

from piece_ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
