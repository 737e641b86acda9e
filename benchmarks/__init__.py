"""`make bench`: what the service costs, as ratios measured in one run.

Nothing here is imported by the service. `docs/benchmarks.md` explains each figure.
"""
