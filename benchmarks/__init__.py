"""Benchmarks: run by `make bench`; results with hardware and versions in results/."""
