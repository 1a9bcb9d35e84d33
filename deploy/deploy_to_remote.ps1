# Starts machine B by ssh and machine A here, and verifies both; -Stop stops both.
#   deploy\deploy_to_remote.ps1 -RemoteIP 192.168.1.102 [-User NAME] [-Address 192.168.1.101] [-Stop]
# Runs `noodle deploy`. For a Windows machine B it prints what to run there.
param(
    [Parameter(Mandatory = $true)][string]$RemoteIP,
    [string]$User,
    [string]$Address,
    [switch]$Stop
)
$ErrorActionPreference = 'Stop'
Set-Location (Split-Path -Parent $PSScriptRoot)
. (Join-Path $PSScriptRoot 'command.ps1')

$options = @('deploy', '--remote', $RemoteIP)
if ($User) { $options += @('--user', $User) }
if ($Address) { $options += @('--address', $Address) }
if ($Stop) { $options += '--stop' }
Invoke-Noodle $options
exit $LASTEXITCODE
