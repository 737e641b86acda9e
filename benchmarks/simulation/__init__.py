"""Simulate a day of a fleet in minutes: real dispatcher, claims and autoscaling, fake machines."""
