"""The HTTP side of every service: gunicorn worker, connections, errors, authentication and connectivity tests.

Knows Flask and gunicorn; never the routes or the work of a service.
"""
