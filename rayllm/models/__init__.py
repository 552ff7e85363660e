"""The models that rayllm runs: one decoder, whose configurations the architectures are.

It knows what checkpoints call their tensors, but reads no file; and nothing of batches or caches.
"""
