"""Microbenchmarks: what the operators cost beside what a user would pick instead. Run `python -m bench.report`."""
