"""`noodle doctor`: gathers facts about this machine and its links and judges each one; changes nothing."""
