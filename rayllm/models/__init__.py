"""The models that rayllm runs: one decoder, whose configurations the architectures are.

It knows nothing of batches, of caches, or of the files that weights come from.
"""
