"""The routes of the user's guide: forwards and loads by hand, beside the requests that the pipeline serves."""
