"""Metrics of every service: counted, or read when Prometheus scrapes.

Knows prometheus_client and this machine; never HTTP routes.
"""
