"""The same service built the usual way, for comparison: FastAPI accepts photos, and Celery restores
them with one worker process for each ComfyUI.

It is built with care on the same Postgres, Valkey and S3: connection pools everywhere, the same
check of each upload, one task at a time that is acknowledged at its end, ComfyUI's websocket
instead of polling. It has no tokens, events, quotas or leases, which is in its favour.
"""
