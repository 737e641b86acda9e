"""One module for each revision; `down_revision` names the one before it."""
