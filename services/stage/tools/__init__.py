"""Processes that the command line starts beside a cluster: verify's reference, bench's control and profile."""
