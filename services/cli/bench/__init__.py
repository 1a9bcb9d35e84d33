"""`noodle bench` and `noodle profile`: measurements, their reports, tables and plots; the computing is a stage's."""
