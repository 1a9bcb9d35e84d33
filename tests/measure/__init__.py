"""The measurements behind docs/measurements.md; `make measure` runs all of them."""
