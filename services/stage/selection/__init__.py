"""Chooses device, dtype, executor and weights of a stage by measurement, and describes the machine in a report.

Knows executors and this machine; never plans, requests or other stages.
"""
