"""What the user `noodle` may do in Valkey, as its ACL file says: keys of noodle's own, and the commands it uses.

`valkey.py` uses these commands; a contract test runs all of it as this user.
"""

from __future__ import annotations

import hashlib

USER = "noodle"
COMMANDS = (
    # a connection
    "auth", "client|setinfo", "client|setname", "echo", "hello", "info", "multi", "exec", "discard", "ping", "quit",
    # values and lists
    "del", "expire", "get", "incrby", "lrange", "mget", "pexpire", "rpush", "scan", "set",
    # the lease and a stage's place, each in one step on the server
    "eval",
    # the queued way of a hop
    "xadd", "xread", "xrevrange",
)  # fmt: skip


def acl_text(password: str) -> str:
    """The content of Valkey's ACL file: nobody but `noodle`, who shows this password; it is kept as its digest."""
    digest = hashlib.sha256(password.encode()).hexdigest()
    commands = " ".join(f"+{command}" for command in COMMANDS)
    return f"user default off\nuser {USER} on #{digest} ~noodle:* resetchannels -@all {commands}\n"
