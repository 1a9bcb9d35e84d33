#!/usr/bin/env bash
# Shows who can connect to the ports that this machine publishes; --apply sets the rules, --undo removes them (as root).
#   sudo deploy/firewall.sh --apply [--clients 192.168.1.0/24]
# Finds or installs the command, then runs `noodle firewall`; --help lists its options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/command.sh
noodle firewall "$@"
