"""What the search's commands are made of; see docs/program.md."""

import sys

if sys.platform != "linux":  # locks, signals and the fork server are Linux's
    print(f"error: this program runs on Linux only, not on {sys.platform}", file=sys.stderr)
    raise SystemExit(2)
