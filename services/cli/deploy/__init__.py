"""`noodle deploy`: starts machine A here and machine B by ssh."""
