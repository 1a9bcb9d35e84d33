"""How steps and results travel: the direct way (POST /hop, GET /results) and the queue, with bounds on every buffer.

Knows frames, streams and connections, and what a step computes only by its plan's shapes.
"""
