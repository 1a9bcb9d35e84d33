"""Processes of this machine: what `noodle up` starts and supervises. Linux only, but imports on Windows."""
