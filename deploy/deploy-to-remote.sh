#!/usr/bin/env bash
# Starts machine B by ssh and machine A here, and verifies both; --stop stops both.
#   deploy/deploy-to-remote.sh 192.168.1.102 [--user NAME] [--address 192.168.1.101] [--stop]
# Finds or installs the command, then runs `noodle deploy`; --help lists its options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/command.sh
noodle deploy --remote "${1:?Give the IP address of machine B, as 192.168.1.102}" "${@:2}"
