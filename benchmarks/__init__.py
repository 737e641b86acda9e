"""What the system's speed is measured with, and against."""
