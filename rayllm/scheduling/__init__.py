"""Policy: which tokens a step computes, in which blocks, and how much of a prompt is kept. Plain Python.

It knows sequences and blocks by number, and nothing of tensors, devices or processes: neither torch nor ray.
"""
