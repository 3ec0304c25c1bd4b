"""Measurements behind the figures of docs/benchmarks.md: `python -m benchmarks.NAME [--options]` prints one JSON line.

Ratios are taken within one run whose two sides alternate, so that a machine that is busy now and then slows both.
"""
