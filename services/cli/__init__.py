"""The `noodle` command line: an HTTP client, and what starts and checks a cluster; imports no service and no torch."""
