"""What crosses between processes, and how: steps, sequences, tokens, and the ZeroMQ sockets that carry them.

It knows the vocabulary and nothing of who sends or receives: neither Ray's actors, nor schedulers, nor devices.
"""
