"""Configuration: every environment variable declared once, and the frozen settings of each process.

Knows names, units, defaults and checks; starts nothing.
"""
