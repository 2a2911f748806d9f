"""Benchmarks: one claim each, measured against what it claims to beat."""
