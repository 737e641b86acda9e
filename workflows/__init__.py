"""Workflows, one folder each, and the code that loads, checks and renders them."""
