"""Benchmarks: one claim each, measured against what it claims to beat."""

import os

# As trials have it (processes.py); read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
