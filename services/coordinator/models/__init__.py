"""Find, fetch, convert and serve the files of the model. Knows neither requests nor layers."""
