"""Reads uploads, and writes the engine's input and the files of results.

`reader.read` and `encode.encode` block and handle untrusted bytes, so they run in sandboxed image
processes (`process`), which `process_pool` starts and replaces.
"""
