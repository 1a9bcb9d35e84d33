"""What crosses a hop between processes: typed messages, frames, connections and streams.

Knows bytes and bounds; never what a step computes.
"""
