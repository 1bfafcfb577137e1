"""Benchmarks: `run.py` measures and writes JSON lines, `report.py` turns them into tables and plots."""
