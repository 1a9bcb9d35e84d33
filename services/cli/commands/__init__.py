"""The small commands, one file each; the larger ones are folders beside this one."""
