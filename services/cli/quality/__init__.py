"""`noodle quality`: what a format of weights does to a model, by a text that the running cluster scores."""
