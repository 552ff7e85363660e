"""Prompts in, text out: the Python interfaces, tokenising, detokenising, stop strings, and going on after a death.

It knows nothing of steps, blocks or devices; clients know engines only by `Link`, wherever these run.
"""
