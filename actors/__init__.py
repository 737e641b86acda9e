"""Where Ray lives: the pool of GPU workers, the dispatcher, the status actor, and their handles.

What is decided is in plain async code that knows no Ray (pyproject.toml lists those modules):
`submission`, `execution` and `outcomes` first of all.
"""
