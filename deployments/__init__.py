"""The Ray Serve application: HTTP and handle calls in, answers out; and the command that starts it.

It knows engines as replicas that admit sequences, and nothing of how they schedule or compute them.
"""
