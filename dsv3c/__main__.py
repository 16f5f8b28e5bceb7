"""`python -m dsv3c` is the command `dsv3c`, so that torchrun can start it as a module."""

from __future__ import annotations

import sys

from dsv3c.cli import main

if __name__ == "__main__":
    sys.exit(main())
