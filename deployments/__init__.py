"""The Ray Serve application: HTTP and handle calls in, answers out; and the commands that start it.

It knows engines as replicas that admit sequences, and nothing of steps, blocks or devices.
"""
