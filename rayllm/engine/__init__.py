"""The Ray actors of an engine, driver and shards, and how they are placed, started, watched and ended.

It knows nothing of text: prompts come as token ids, and tokens leave as ids.
"""
