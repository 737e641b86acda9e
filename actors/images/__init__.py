"""Pictures: the one reader of uploads, the engine's input, and the files of results. Pure code.

All of it blocks; `read` and `encode` work on the sender's bytes and belong in a process that may
be killed.
"""
