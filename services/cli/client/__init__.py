"""What every command uses to talk to a cluster: target, HTTP, health, reports and progress; starts nothing."""
