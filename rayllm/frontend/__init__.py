"""Prompts in, text out: the Python interfaces, tokenising, detokenising, stop strings, and going on after a death.

It knows engines only by `Link`: none of it depends on where they run.
"""
