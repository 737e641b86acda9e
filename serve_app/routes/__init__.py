"""The routes of the API, one module for each resource. `app` includes the module's `router`.

These have no router, and are used by the routes of several resources: `dependencies` (services,
caller, scopes), `preferences` (Prefer, Accept), `submissions` (of one picture), `views` (jobs as
JSON), `results` and `downloads` (a result's bytes).
"""
