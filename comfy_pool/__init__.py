"""One ComfyUI and how to live with it: no Ray, no database."""
