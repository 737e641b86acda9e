"""The readers of file formats: each takes a file's bytes, and gives samples and what they mean.

Each looks at the header and refuses what is too large before it decodes anything. They raise
InvalidRequest and its kin, and whatever their decoders raise; `actors.images.reader` turns that
into BrokenImage.
"""
