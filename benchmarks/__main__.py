"""Every benchmark that this machine can run, one after the other: `make bench`, or `python -m benchmarks NAME ...`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ON_CPU = ("train_tiny", "decode_tiny")


def main(names: list[str]) -> int:
    """Run the named benchmarks, or those of the CPU; gives the worst exit status."""
    known = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("__main__", "common", "peers"))
    for name in names:
        if name not in known:
            print(f"benchmarks: no benchmark is called '{name}'; known: {', '.join(known)}", file=sys.stderr)
            return 2
    scripts = [str(HERE / f"{name}.py") for name in names or ON_CPU]
    return max(subprocess.run([sys.executable, script], check=False).returncode for script in scripts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
