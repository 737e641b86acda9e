"""The same service built the usual way, to be compared with: FastAPI takes photos in, Celery has
them restored, one worker process for each ComfyUI.

Built with care and on the same Postgres, Valkey and S3: pools everywhere, the same check of each
upload, one task at a time acknowledged when it is done, ComfyUI's websocket instead of polling. It
has no tokens, events, quotas or leases, which is in its favour.
"""
