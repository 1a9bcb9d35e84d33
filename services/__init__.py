"""The services and the command of noodle; services never import one another, and share only `noodle`."""
