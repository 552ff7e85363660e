"""Batch jobs: files of requests become files of answers, by engines behind Ray Data.

It knows nothing of HTTP servers: a row is answered by the service's own endpoints, in the engine's process.
"""
