#!/usr/bin/env bash
# Shows who may come to the ports that this machine publishes; --apply sets it, --undo takes it away (both as root).
#   sudo deploy/firewall.sh --apply [--clients 192.168.1.0/24]
# All of it is in `noodle firewall` (`--help` says the rest); this finds or makes the command first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/command.sh
noodle firewall "$@"
