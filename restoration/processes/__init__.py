"""Child processes that end with their parent, however it ends.

`child` starts every program of the product under `guard`, which owns the program's process tree.
The exceptions are image processes, which have no tree and bind themselves.
"""
