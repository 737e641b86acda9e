"""A day of a fleet in a minute: real dispatcher, claims and autoscaling, simulated machines."""
