"""Serves one bundle over HTTP by the Open Inference Protocol v2: an ASGI application, and the processes that run it.

It imports nothing that compiles. What it needs beyond torch is in the extra ``armopt[serve]``.
"""
