"""The ACL file of Valkey: the user `noodle` may use noodle's own keys, with the commands that `valkey.py` needs."""

from __future__ import annotations

import hashlib

USER = "noodle"
COMMANDS = (
    # connections
    "auth", "client|setinfo", "client|setname", "echo", "hello", "info", "multi", "exec", "discard", "ping", "quit",
    # values and lists
    "del", "expire", "get", "incrby", "lrange", "mget", "pexpire", "rpush", "scan", "set",
    # leases, each in one step on the server
    "eval",
    # streams of hops
    "xadd", "xread", "xrevrange",
)  # fmt: skip


def acl_text(password: str) -> str:
    """Return an ACL file that allows only the user `noodle`, and has the digest of its password."""
    digest = hashlib.sha256(password.encode()).hexdigest()
    commands = " ".join(f"+{command}" for command in COMMANDS)
    return f"user default off\nuser {USER} on #{digest} ~noodle:* resetchannels -@all {commands}\n"
