"""The figures behind every claim: `make measure` runs them and writes docs/measurements.md."""
