"""A project folder for Docker: .env, secrets, join line and firewall rules, and the programs run for it."""
