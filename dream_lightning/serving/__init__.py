"""A model behind HTTP: `engine` (continuous batching), `requests` (JSON → rows), `api` (endpoints), `server`."""
