# Shows who can connect to the ports that this machine publishes; -Apply sets the rules, -Undo removes them (as
# administrator).
#   deploy\firewall.ps1 -Apply [-Clients 192.168.1.0/24]
# Runs `noodle firewall`, which also narrows Docker Desktop's own rule to the same addresses.
param(
    [switch]$Apply,
    [switch]$Undo,
    [string[]]$Clients
)
$ErrorActionPreference = 'Stop'
Set-Location (Split-Path -Parent $PSScriptRoot)
. (Join-Path $PSScriptRoot 'command.ps1')

$options = @('firewall')
if ($Apply) { $options += '--apply' }
if ($Undo) { $options += '--undo' }
if ($Clients) { $options += @('--clients') + $Clients }
Invoke-Noodle $options
exit $LASTEXITCODE
