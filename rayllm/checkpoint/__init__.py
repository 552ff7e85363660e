"""Files of models: where they are found, how they are read, and what they say of their model.

It knows nothing of engines, steps or caches.
"""
