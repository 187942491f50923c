"""Benchmarks and fault runs: each module has `run() -> dict`; figures are kept in bench/results/."""
