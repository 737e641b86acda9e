"""The Ray deployments and actors: GPU workers, dispatcher, maintenance, status actor, handles.

The decisions are made in plain async code that does not import Ray, mainly in `submission` and
`execution`; a contract in pyproject.toml lists those modules.
"""
