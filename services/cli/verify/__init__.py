"""`noodle verify`: compares the cluster's tokens with the unsplit model's."""
