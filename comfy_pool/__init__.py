"""Run ComfyUI: install it, start and watch its process, and run prompts on it.

Independent of Ray and of the database.
"""
