"""A step on a shard's device: rows become the model's input, its output becomes tokens.

It knows nothing of requests, queues or Ray: what is computed, a `StepInput` says.
"""
