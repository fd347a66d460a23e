"""Benchmarks: ``python -m bench [OP ...] [--quick] [--out FILE.jsonl]``; see ``harness``."""
