"""A model over HTTP: a JSON API, and the REST API of Annif."""
