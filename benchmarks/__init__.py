"""`make bench`: measure the cost of the service, mostly as ratios within one run.

The service imports nothing from here. `docs/benchmarks.md` explains each figure.
"""
