"""A day of a fleet in minutes: real dispatcher, claims and autoscaling, simulated machines."""
