"""A step on a shard's device: rows become the model's input, its output becomes tokens.

It knows nothing of requests, Ray or the scheduler: all that it does, a `StepInput` says.
"""
