"""Where Ray lives: the pool of GPU workers, the dispatcher, the status actor, and their handles.

`submission`, `execution` and `outcomes` hold what is decided; they are plain async code and know
no Ray.
"""
