"""Readers of the file formats. Each returns the Samples of a file's bytes.

Each reader checks the size in the header before it decodes anything. A reader raises InvalidRequest
or a subclass, or any exception of its decoder, which `actors.images.reader` converts to
BrokenImage.
"""
