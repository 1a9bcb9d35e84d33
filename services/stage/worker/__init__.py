"""The stage's loop: sessions, steps and sampling over a slice of the model; no connections and no text."""
